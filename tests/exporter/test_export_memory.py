"""Memory does not grow with the checkpoint: the largest 11B-width model that fits the disk, exported by the command."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from bench.random_checkpoint import INSTRUCT_11B, with_layers, write_random_checkpoint
from mllama_exporter.checkpoint import expected_tensors

MAX_RESIDENT_BYTES = 1.5e9
DISK_SHARE = 0.8


@pytest.mark.slow
def test_export_stays_within_its_memory(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free * DISK_SHARE
    fitting = [layers for layers in range(4, 41) if 2 * size_bytes(layers) < free]
    num_layers = max(fitting)  # one copy in BF16, one in FP16
    write_random_checkpoint(tmp_path / "checkpoint", with_layers(INSTRUCT_11B, num_layers))
    command = [Path(sys.executable).with_name("mllama"), "export", tmp_path / "checkpoint", tmp_path / "bundle"]
    result = subprocess.run([*command, "--dtype", "fp16", "--json"], stdout=subprocess.PIPE, check=True)
    summary = json.loads(result.stdout)
    print(num_layers, "layers,", size_bytes(num_layers), "bytes:", summary)
    assert summary["peak_memory_bytes"] <= MAX_RESIDENT_BYTES
    shutil.rmtree(tmp_path / "checkpoint")
    shutil.rmtree(tmp_path / "bundle")


def size_bytes(num_layers: int) -> int:
    shapes = expected_tensors(with_layers(INSTRUCT_11B, num_layers)).values()
    return 2 * sum(math.prod(shape) for shape in shapes)
