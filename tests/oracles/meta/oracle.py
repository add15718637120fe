"""Meta's own code, the package llama-models, on inputs from files; runs in the environment of requirements.txt.

`oracle.py model FOLDER` makes a model of random weights and runs it. It reads
    model.json: `params`, the arguments of ModelArgs; `vision`, those of a VisionEncoder to put in the place of the one
        that Meta's code always makes, or null; and `answers`, name -> mask semantics and the indices of the vision
        states, null for those of the model;
    requests/*.npz: token_ids [seq], the id `vocab_size` where a picture stands; num_prompt, how many of them are the
        prompt; for every picture i pixels_i [tiles, 3, S, S] and canvas_i, its (tiles high, tiles wide);
and writes
    original/: the weights, in the form in which Meta publishes them;
    answers/*/*.npz: logits [1 + seq - num_prompt, vocab] behind the prompt and each token after it; key_i and value_i
        [G, images * max_num_tiles * patches, D] of cross-attention layer i among its kind.

`oracle.py processor FOLDER` cuts pictures and writes prompts. It reads
    pictures/*: picture files, and sizes.json, (width, height) of others;
    dialogs.json: [{"role", "content"}] each, a content being a list of texts and nulls, which stand for pictures; and
        contents.json: such contents by themselves, prompts of a base model;
and writes
    tiles/*.npz: tiles [tiles, 3, 224, 224] and canvas, (tiles high, tiles wide), of each picture, or nothing where
        Meta's code fails;
    canvases.npy: (tiles high, tiles wide, pixels high, pixels wide) of each size, the picture being resized to those;
    prompts.json: for each dialog, then each content: `runs`, [text, whether it is a special token]; `tokens`; and
        `sees`, bool [tokens + 3, pictures], what each token and the next three to come see in Meta's `generate`.
"""

from __future__ import annotations

import io
import itertools
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

if (
    torch.version.cuda is None
):  # torchvision's operators are built for CUDA and do not load, but must have been declared
    _DECLARED = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        _DECLARED.define(f"{name}(Tensor boxes, Tensor scores, float iou_threshold) -> Tensor")

from fairscale.nn.model_parallel.initialize import initialize_model_parallel
from fairscale.nn.model_parallel.layers import ColumnParallelLinear
from llama_models.datatypes import RawMediaItem, RawMessage, RawTextItem
from llama_models.llama3.args import ModelArgs
from llama_models.llama3.chat_format import ChatFormat, LLMInput, create_vision_mask
from llama_models.llama3.multimodal.image_transform import VariableSizeImageTransform
from llama_models.llama3.multimodal.model import CrossAttentionTransformer, VisionEncoder, _pad_masks
from llama_models.llama3.tokenizer import Tokenizer
from PIL import Image
from torch import Tensor, nn

TILE = 224


def answer_requests(folder: Path) -> None:
    spec = json.loads((folder / "model.json").read_text())
    model = random_model(spec["params"], spec["vision"])
    (folder / "original").mkdir()
    (folder / "original" / "params.json").write_text(json.dumps(spec["params"]))
    weights = {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}
    torch.save(weights, folder / "original" / "consolidated.00.pth")
    for name, (semantics, indices) in spec["answers"].items():
        if indices:
            model.vision_model.vision_encoder.return_intermediate = indices
        layers = model.text_model.cross_attention_layers if semantics == "hf" else []
        hooks = [layer.attention.register_forward_pre_hook(first_branch_unmasked, with_kwargs=True) for layer in layers]
        (folder / "answers" / name).mkdir(parents=True)
        for path in sorted((folder / "requests").glob("*.npz")):
            with np.load(path) as request, torch.no_grad():
                np.savez(folder / "answers" / name / path.name, **answer(model, request))
        for hook in hooks:
            hook.remove()


def random_model(params: Mapping[str, Any], vision: Mapping[str, Any] | None) -> CrossAttentionTransformer:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    initialize_model_parallel(1)
    args = ModelArgs(**params)
    model = CrossAttentionTransformer(args)
    if vision is not None:  # the class of the vision half has the tower's width, depth and indices as constants
        num_features = vision["width"] * (1 + len(vision["return_intermediate"]))
        model.vision_model.vision_encoder = VisionEncoder(**vision)
        model.vision_model.vision_projection = ColumnParallelLinear(num_features, args.dim, init_method=lambda x: x)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        parameter.data = random_values(name, parameter.shape, generator)
    model.setup_cache(args.max_batch_size, torch.device("cpu"), torch.float32)
    model.image_transform = lambda tiles_and_canvas: tiles_and_canvas  # pictures come as its results
    return model.eval()


def random_values(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Values that bfloat16 has, such that every parameter shows in the logits."""
    noise = torch.randn(shape, generator=generator)
    if "gate" in name and len(shape) == 1:
        noise = 0.6 + 0.2 * noise.tanh()
    elif "norm" in name or ".ln_" in name:
        noise = 0.3 * noise + (0 if name.endswith("bias") else 1)
    elif name.endswith("bias"):
        noise = 0.3 * noise
    elif "embed" in name:
        noise = 0.7 * noise
    else:  # [out, in]; queries and keys somewhat larger, so that attention prefers some rows
        noise = noise * (1.5 if name.endswith(("wq.weight", "wk.weight")) else 1.0) * shape[1] ** -0.5
    return noise.bfloat16().float()


def first_branch_unmasked(module: nn.Module, args: tuple[()], kwargs: dict[str, Any]) -> Any:
    """hf semantics: a cross-attention layer's first branch stays in the rows that see no picture.

    Meta's code takes it out there; what it does to the second branch is done outside of this module, and stands.
    """
    ones = torch.ones_like(kwargs["full_text_row_masked_out_mask"])
    return args, kwargs | {"full_text_row_masked_out_mask": ones}


def answer(model: CrossAttentionTransformer, request: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[np.float32]]:
    """Meta's forward over the prompt, then token by token, as its `generate` calls it but with the tokens given.

    The masks are those of all the tokens, as if they were one prompt: `generate` makes them of the prompt alone.
    """
    tokens = torch.tensor(request["token_ids"])[None]
    num_tokens, num_prompt = tokens.shape[1], int(request["num_prompt"])
    num_images = sum(name.startswith("pixels_") for name in request)
    images = [(torch.tensor(request[f"pixels_{i}"]), tuple(request[f"canvas_{i}"])) for i in range(num_images)]
    masks = create_vision_mask(tokens[0].tolist(), model.params.vocab_size)
    caches, cross_masks, row_masks = model.compute_vision_tokens_masks([images], [masks], num_tokens, tokens.device)
    logits = []
    for start, stop in [(0, num_prompt), *((position, position + 1) for position in range(num_prompt, num_tokens))]:
        positions = torch.arange(start, stop)
        logits.append(model(positions, tokens, cross_masks, row_masks, caches, text_only_inference=not images)[0, -1])
    one_of_group = caches[:, :, 0, :: model.params.n_heads // model.params.n_kv_heads]  # [layers, 2, G, rows, D]
    found = {"logits": torch.stack(logits)}
    for i, (key, value) in enumerate(one_of_group):
        found |= {f"key_{i}": key, f"value_{i}": value}
    return {name: tensor.numpy() for name, tensor in found.items()}


def cut_and_write(folder: Path) -> None:
    formatter = ChatFormat(Tokenizer.get_instance())
    transform = VariableSizeImageTransform(TILE)
    (folder / "tiles").mkdir()
    for path in sorted((folder / "pictures").iterdir()):
        image = formatter.encode_content([RawMediaItem(data=path.read_bytes())]).vision.images[0]
        try:
            tiles, canvas = transform(image, max_num_chunks=4)
        except ValueError as fault:
            print(path.name, fault)
        else:
            np.savez(folder / "tiles" / f"{path.name}.npz", tiles=tiles.numpy(), canvas=canvas)
    sizes = json.loads((folder / "sizes.json").read_text())
    np.save(folder / "canvases.npy", np.array([canvas_of(transform, *size) for size in sizes]))

    inputs = []
    for dialog in json.loads((folder / "dialogs.json").read_text()):
        messages = [RawMessage(role=turn["role"], content=items(turn["content"])) for turn in dialog]
        inputs.append(formatter.encode_dialog_prompt(messages))
    inputs += [formatter.encode_content(items(each)) for each in json.loads((folder / "contents.json").read_text())]
    written = [
        {"runs": runs(each.tokens, formatter.tokenizer), "tokens": each.tokens, "sees": visible(each)}
        for each in inputs
    ]
    (folder / "prompts.json").write_text(json.dumps(written))


def canvas_of(transform: VariableSizeImageTransform, width: int, height: int) -> tuple[int, ...]:
    """What the transform does with a picture of that size, asked step by step: nothing is cut."""
    resolutions = torch.tensor(transform.find_supported_resolutions(max_num_chunks=4, patch_size=TILE))
    canvas = transform.get_best_fit((width, height), resolutions)
    resized = transform.resize_without_distortion(Image.new("L", (width, height)), canvas, transform.size)
    return canvas[1] // TILE, canvas[0] // TILE, resized.height, resized.width


def items(content: list[str | None]) -> list[RawTextItem | RawMediaItem]:
    png = io.BytesIO()
    Image.new("RGB", (8, 8)).save(png, "png")
    return [RawMediaItem(data=png.getvalue()) if item is None else RawTextItem(text=item) for item in content]


def runs(tokens: list[int], tokenizer: Tokenizer) -> list[tuple[str, bool]]:
    """Special tokens one by one, and the text between them."""
    image_token_id = tokenizer.special_tokens["<|image|>"]
    tokens = [image_token_id if token == 128256 else token for token in tokens]  # the checkpoints' id for it
    groups = itertools.groupby(tokens, lambda token: token if token in tokenizer.special_tokens.values() else None)
    found: list[tuple[str, bool]] = []
    for special, group in groups:
        if special is None:
            found.append((tokenizer.decode(list(group)), False))
        else:
            found += [(tokenizer.decode([token]), True) for token in group]
    return found


def visible(prompt: LLMInput) -> list[list[bool]]:
    """The mask that compute_vision_tokens_masks makes, for pictures of one tile."""
    if prompt.vision is None:
        return [[] for _ in range(len(prompt.tokens) + 3)]
    num_pictures = len(prompt.vision.images)
    mask = _pad_masks([prompt.vision.mask], [[1] * num_pictures], len(prompt.tokens) + 3, 4)
    return (mask[0, :, :, 0] == 0).tolist()


if __name__ == "__main__":
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the group of one that fairscale wants needs no network
    {"model": answer_requests, "processor": cut_and_write}[sys.argv[1]](Path(sys.argv[2]))
