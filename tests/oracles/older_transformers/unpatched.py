"""What transformers makes of a checkpoint and prompts, exactly as it is installed: nothing of it is hooked or changed.

    unpatched.py CHECKPOINT PROMPTS OUTPUT

PROMPTS is a JSON list of {"text", "images": paths, "is_measured"}. OUTPUT, an npz file, gets the greedy `i.answer` to
prompt i; of a measured one the last token's `i.logits` too, and with pictures the vision model's `i.features`,
`i.cross_key_l` and `i.cross_value_l`. Runs in transformers 4.54 and in 5.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image

MAX_NEW_TOKENS = 16


def tensors_of(model: Any, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Features [B, I, T, P, V * (1 + layers)], keys and values [I, G, T*P, D] of all tiles, logits [vocab]."""
    output = model(**inputs, use_cache=True)
    found = {"logits": output.logits[0, -1]}
    if "pixel_values" in inputs:
        pictures = {name: inputs[name] for name in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")}
        found["features"] = model.model.vision_model(**pictures).last_hidden_state
        for layer in model.config.text_config.cross_attention_layers:
            cache = output.past_key_values.layers[layer]
            found |= {f"cross_key_{layer}": cache.keys, f"cross_value_{layer}": cache.values}
    return found


def main(checkpoint: Path, prompts: Path, output: Path) -> None:
    torch.set_num_threads(1)
    processor: Any = transformers.AutoProcessor.from_pretrained(checkpoint)
    kind: Any = transformers.MllamaForConditionalGeneration
    model = kind.from_pretrained(checkpoint, torch_dtype=torch.float32).eval()  # transformers 5 still knows this name
    found: dict[str, Any] = {"version": transformers.__version__}
    for index, prompt in enumerate(json.loads(prompts.read_text())):
        images = [Image.open(path) for path in prompt["images"]] or None
        inputs = processor(images=images, text=prompt["text"], add_special_tokens=False, return_tensors="pt")
        with torch.inference_mode():
            if prompt["is_measured"]:
                found |= {f"{index}.{name}": tensor.numpy() for name, tensor in tensors_of(model, inputs).items()}
            tokens = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)[0]
        found[f"{index}.answer"] = tokens[inputs["input_ids"].shape[1] :].numpy()
    np.savez(output, **found)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
