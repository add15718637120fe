"""A second judge at full width: transformers in float32, on the same random weights, beside a back end of ours.

    python -m gpu.judge BUNDLE CONFIG.json [--backend cuda] [--out OUT]

The bundle's own weights file is what both read. Compared are a picture's keys and values, and teacher-forced logits of
prompts with and without pictures. A last run, with a few of the judge's weights changed, shows that it would notice.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu.fill import tensors_of
from gpu.forced import Logits, compared, forced_logits
from gpu.record import Fields, Recorder
from mllama_exporter.reference_tower import take_states
from mllama_runtime.backends import Backend, backend_from_bundle
from mllama_runtime.bench import sample_tiles
from mllama_runtime.bundle import Bundle
from mllama_runtime.engine_record import Limits
from mllama_runtime.preprocessing import ImageTiles
from mllama_runtime.streaming import TextStream
from mllama_runtime.tokenizer import Tokenizer

_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
_LIMITS = Limits(max_batch=1, max_seq_len=512, prefill_chunk=256, max_tiles=4)
_NUM_BEFORE, _NUM_FORCED = 5, 6
AGREES = {"fp32": 1e-4, "fp16": 0.02, "bf16": 0.1}
"""The largest relative error of logits, keys and values: a few roundings of the precision, grown through the layers."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """num_tiles: of its picture, which stands behind a few tokens; 0 for none."""

    name: str
    num_tokens: int
    num_tiles: int


PROMPTS = (
    Prompt("text", 40, 0),
    Prompt("picture of 4 tiles", 60, 4),
    Prompt("picture of 1 tile", 60, 1),
    Prompt("picture of 2 tiles, long", 200, 2),
)


class Judge:
    """transformers' own model on a device, with the weights of a bundle that is not quantised."""

    def __init__(self, bundle: Bundle, config: Path, device: str, dtype: torch.dtype) -> None:
        import transformers

        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        self._device, self._config = device, bundle.manifest.model
        settings = transformers.MllamaConfig.from_json_file(config)
        kind: Any = transformers.MllamaForConditionalGeneration
        with torch.device(device):
            self.model = kind._from_config(settings, dtype=dtype, attn_implementation="sdpa").eval()
        if found := {parameter.dtype for parameter in self.model.parameters()} - {dtype}:
            raise RuntimeError(f"the judge has weights in {found} instead of {dtype}")
        self._fill(bundle)
        take_states(self.model.model.vision_model, bundle.manifest.vision_states)

    def _fill(self, bundle: Bundle) -> None:
        parameters = dict(self.model.named_parameters())
        missing = set(parameters)
        with torch.no_grad():
            for name, stored in _stored(bundle):
                place = _modern(name, parameters)
                parameters[place].copy_(stored.reshape(parameters[place].shape))
                missing.discard(place)
        if missing:
            raise RuntimeError(f"the bundle has no weights for {', '.join(sorted(missing)[:4])}")

    def disturb(self) -> None:
        """Some output channels of the decoder's last matrix, and of the projector, trade places."""
        layers = self.model.model.language_model.layers
        last = max(set(range(len(layers))) - set(self._config.cross_layers))
        with torch.no_grad():
            for weight in (layers[last].mlp.down_proj.weight, self.model.model.multi_modal_projector.weight):
                some = weight.shape[0] // 16
                weight[:some] = weight[:some].roll(1, 0)

    def run(
        self, token_ids: np.ndarray, num_forced: int, tiles: ImageTiles | None
    ) -> tuple[Logits, dict[str, np.ndarray]]:
        """Logits behind the prompt and every forced token, the last of token_ids; and the pictures' keys and values."""
        ids = torch.from_numpy(token_ids)[None].to(self._device)
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if tiles is not None:
            seen = torch.zeros(1, len(token_ids), 1, self._config.vision.max_num_tiles, dtype=torch.int64)
            seen[:, _NUM_BEFORE:, :, : tiles.num_tiles] = 1
            inputs |= {
                "pixel_values": torch.from_numpy(np.array(tiles.pixel_values))[None, None].to(self._device),
                "aspect_ratio_ids": torch.tensor([[tiles.aspect_ratio_id]], device=self._device),
                "aspect_ratio_mask": torch.from_numpy(tiles.aspect_ratio_mask)[None, None].to(self._device),
                "cross_attention_mask": seen.to(self._device),
            }
            inputs["pixel_values"] = inputs["pixel_values"].to(next(self.model.parameters()).dtype)
        with torch.inference_mode():
            output = self.model(**inputs, use_cache=True)
        cross: dict[str, np.ndarray] = {}
        for layer in self._config.cross_layers if tiles is not None else ():
            cache = output.past_key_values.layers[layer]
            cross[f"cross_key_{layer}"] = cache.keys.float().cpu().numpy()
            cross[f"cross_value_{layer}"] = cache.values.float().cpu().numpy()
        return output.logits[0, -num_forced - 1 :].float().cpu().numpy(), cross


def _stored(bundle: Bundle) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of the weights files, as it is stored."""
    for name in bundle.manifest.files:
        if not name.endswith(".safetensors"):
            continue
        path = bundle.path(name)
        with path.open("rb") as file:
            length = file.read(8)
            header = length + file.read(int.from_bytes(length, "little"))
        for tensor in tensors_of(header):
            data = np.fromfile(path, np.uint8, tensor.num_bytes, offset=tensor.offset)
            yield tensor.name, torch.from_numpy(data).view(_DTYPES[tensor.dtype]).reshape(tensor.shape)


def _modern(name: str, parameters: dict[str, Any]) -> str:
    """A published name as transformers 5 has it."""
    for old, new in (
        ("language_model.lm_head", "lm_head"),
        ("language_model.model.", "model.language_model."),
        ("vision_model.", "model.vision_model."),
        ("multi_modal_projector.", "model.multi_modal_projector."),
    ):
        if name.startswith(old) and new + name[len(old) :] in parameters:
            return new + name[len(old) :]
    return name


def compare(bundle: Bundle, judge: Judge, backend: Backend, record: Recorder, label: str) -> list[float]:
    """Every prompt; the relative errors of their logits, and then of the pictures' keys and values."""
    text = TextStream(Tokenizer.from_file(bundle.path("tokenizer.json")).backend, ())
    errors, of_pictures = [], []
    for prompt in PROMPTS:
        found = record.try_(f"{label}: {prompt.name}", partial(_compare, bundle, judge, backend, prompt, text))
        errors.append(found["relative_l2"] if found else float("inf"))
        if prompt.num_tiles:
            of_pictures.append(found["cross_worst"] if found else float("inf"))
    return errors + of_pictures


def _compare(bundle: Bundle, judge: Judge, backend: Backend, prompt: Prompt, text: TextStream) -> Fields:
    model, tiles, features = bundle.manifest.model, None, []
    token_ids = np.random.default_rng(prompt.num_tokens).integers(10, model.text.vocab_size // 2, prompt.num_tokens)
    if prompt.num_tiles:
        token_ids[_NUM_BEFORE] = model.image_token_id
        tiles = _with_padding(sample_tiles(model, prompt.num_tiles), prompt)
        features = [backend.encode(tiles)]
    wanted, cross = judge.run(token_ids, _NUM_FORCED, tiles)
    ids = token_ids.tolist()
    began = time.perf_counter()
    found = forced_logits(backend, bundle, ids[:-_NUM_FORCED], ids[-_NUM_FORCED:], features, text)
    fields = compared(found, wanted)
    fields["seconds"] = time.perf_counter() - began
    if features:
        arrays = features[0].arrays()
        errors = [_relative(arrays[name], cross[name]) for name in arrays]
        fields |= {"cross_worst": max(errors), "cross_mean": sum(errors) / len(errors), "cross_tensors": len(errors)}
    return fields


def _with_padding(tiles: ImageTiles, prompt: Prompt) -> ImageTiles:
    """Padding tiles are zero, as a preprocessor leaves them."""
    pixels = np.array(tiles.pixel_values)
    pixels[prompt.num_tiles :] = 0
    return replace(tiles, pixel_values=pixels, key=prompt.name)


def _relative(found: np.ndarray, wanted: np.ndarray) -> float:
    wide = wanted.reshape(found.shape).astype(np.float64)
    return float(np.linalg.norm(found - wide) / np.linalg.norm(wide))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("config", type=Path)
    parser.add_argument("--backend", default="cuda")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "out")))
    arguments = parser.parse_args()
    bundle = Bundle.open(arguments.bundle)
    record = Recorder(arguments.out, work="judge", bundle=arguments.bundle.name)
    began = time.perf_counter()
    judge = Judge(bundle, arguments.config, arguments.device, getattr(torch, arguments.dtype))
    record.add("judge loaded", seconds=time.perf_counter() - began, device=arguments.device)
    limits = _LIMITS if arguments.backend == "cuda" else None
    with backend_from_bundle(bundle, arguments.backend, None, limits=limits) as backend:
        errors = compare(bundle, judge, backend, record, "same weights")
        judge.disturb()
        disturbed = compare(bundle, judge, backend, record, "judge disturbed")
    allowed = AGREES[bundle.manifest.precision]
    agrees = max(errors) < allowed
    notices = all(other > 3 * same for same, other in zip(errors, disturbed, strict=True))
    record.add("verdict", agrees=agrees, notices=notices, worst=max(errors), disturbed=min(disturbed), allowed=allowed)
    return 0 if agrees and notices else 1


if __name__ == "__main__":
    sys.exit(main())
