"""The random checkpoints of full size: their structure, and a piece of one."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from bench.random_checkpoint import (
    INSTRUCT_11B,
    INSTRUCT_90B,
    MIDSIZE,
    with_layers,
    write_random_checkpoint,
)
from mllama_exporter.checkpoints.checkpoint import Checkpoint, expected_tensors
from mllama_runtime.config import ModelConfig, check_model
from mllama_runtime.errors import CheckpointError


@pytest.mark.parametrize(
    ("config", "num_parameters", "cross_layers"),
    [(INSTRUCT_11B, 10.7e9, range(3, 40, 5)), (INSTRUCT_90B, 88.6e9, range(3, 100, 5))],
    ids=["11b", "90b"],
)
def test_full_sizes(config: ModelConfig, num_parameters: float, cross_layers: range) -> None:
    """Parameters to three digits, as the published checkpoints are listed with."""
    check_model(config, "config", CheckpointError)
    assert config.text.cross_attention_layers == tuple(cross_layers)
    assert float(f"{sum(map(math.prod, expected_tensors(config).values())):.3g}") == num_parameters


def test_a_checkpoint_opens_and_its_seed_fixes_it(tmp_path: Path) -> None:
    config = with_layers(MIDSIZE, 4)
    for name, seed in (("one", 0), ("same", 0), ("other", 1)):
        write_random_checkpoint(tmp_path / name, config, seed=seed)
    checkpoint = Checkpoint.open(tmp_path / "one")
    checkpoint.check()
    assert checkpoint.config == config
    weights = {name: (tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "same", "other")}
    assert weights["one"] == weights["same"] != weights["other"]
    embedding = checkpoint.read("language_model.model.embed_tokens.weight").astype(np.float32)
    assert abs(embedding.std() * embedding.shape[1] ** 0.5 - 1) < 0.01
