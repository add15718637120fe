"""The LoRA merge against its arithmetic: W + scaling * B @ A in float64, from the adapter's files.

test_adapter.py has the first judge: PEFT, in one version.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mllama_exporter.checkpoints import checkpoint_from_folder
from mllama_exporter.checkpoints.checkpoint import Checkpoint
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

# Name in the adapter -> name in the checkpoint.
MODULES = {
    "model.language_model.layers.0.self_attn.q_proj": "language_model.model.layers.0.self_attn.q_proj.weight",
    "model.language_model.layers.1.mlp.down_proj": "language_model.model.layers.1.mlp.down_proj.weight",
    "model.vision_model.transformer.layers.0.mlp.fc1": "vision_model.transformer.layers.0.mlp.fc1.weight",
    "lm_head": "language_model.lm_head.weight",
}
DTYPES = {"BF16": torch.bfloat16, "F32": torch.float32}
BITS = {torch.bfloat16: 8, torch.float32: 24}  # of a significand
FLOAT32 = 2.0**-24  # one operation's relative error


def exact(tensor: torch.Tensor) -> NDArray[np.float64]:
    return tensor.double().numpy()


def stored(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    tensor = checkpoint.tensors[name]
    data = bytearray(tensor.info.size_bytes)
    tensor.read_into(0, memoryview(data))
    return torch.frombuffer(data, dtype=DTYPES[tensor.info.dtype]).reshape(tensor.info.shape)


@pytest.mark.parametrize(
    ("options", "scalings"),
    [
        ({}, (3.0, 3.0, 3.0, 3.0)),
        ({"use_rslora": True}, (6.0, 6.0, 6.0, 6.0)),
        (
            {"rank_pattern": {"q_proj": 9}, "alpha_pattern": {"self_attn.q_proj": 3, "fc1": 40, "proj": 1}},
            (3 / 9, 3.0, 10.0, 3.0),
        ),
        ({"rank_pattern": {"q_proj": 9}, "use_rslora": True}, (4.0, 6.0, 6.0, 6.0)),
    ],
    ids=["plain", "rank-stabilized", "patterns", "both"],
)
@pytest.mark.parametrize(("base", "adapter"), [("BF16", "F32"), ("F32", "BF16")])
def test_merged_weights_are_the_sum_rounded_once(
    options: dict[str, Any], scalings: tuple[float, ...], base: str, adapter: str, miniature: Path, tmp_path: Path
) -> None:
    """The rank is 4 and lora_alpha 12 where no pattern says otherwise; `scalings` are worked out by hand."""
    shutil.copytree(miniature, tmp_path / "base")
    for path in (tmp_path / "base").glob("*.safetensors"):
        save_file({name: tensor.to(DTYPES[base]) for name, tensor in load_file(path).items()}, path)
    plain = checkpoint_from_folder(tmp_path / "base")
    generator, sides = torch.Generator().manual_seed(0), {}
    for module, name in MODULES.items():
        rank = options.get("rank_pattern", {}).get(module.rpartition(".")[2], 4)
        rows, columns = plain.tensors[name].info.shape
        for side, shape in (("A", (rank, columns)), ("B", (rows, rank))):
            values = 0.05 * torch.randn(shape, generator=generator)
            sides[f"base_model.model.{module}.lora_{side}.weight"] = values.to(DTYPES[adapter])
    save_file(sides, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 12, "bias": "none"} | options
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))

    merged, read = (
        checkpoint_from_folder(tmp_path / "base", tmp_path),
        load_file(tmp_path / "adapter_model.safetensors"),
    )
    for (module, name), scaling in zip(MODULES.items(), scalings, strict=True):
        weight, found = (stored(each, name) for each in (plain, merged))
        first, second = (exact(read[f"base_model.model.{module}.lora_{side}.weight"]) for side in "AB")
        expected = exact(weight) + scaling * (second @ first)
        # In float32: the products and their sum, the scaling and the sum with W, each off by its last bit at most.
        # Then one rounding to W's type, by half a step of the result.
        slack = FLOAT32 * (np.abs(exact(weight)) + (first.shape[0] + 3) * scaling * (np.abs(second) @ np.abs(first)))
        _, exponent = np.frexp(np.abs(expected) + slack)
        bound = np.ldexp(0.5, exponent - BITS[weight.dtype]) + slack
        assert found.dtype == weight.dtype
        assert np.all(np.abs(exact(found) - expected) <= bound), module
        assert np.abs(exact(found) - exact(weight)).max() > 2 * bound.max()  # or the test says nothing
    for name in set(plain.tensors) - set(MODULES.values()):
        assert torch.equal(stored(plain, name), stored(merged, name))
