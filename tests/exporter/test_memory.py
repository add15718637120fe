"""Memory does not grow with the model: the largest of 11B width that fits the disk, exported and quantised."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from bench.random_checkpoint import INSTRUCT_11B, with_layers, write_random_checkpoint
from mllama_exporter.checkpoints.checkpoint import expected_tensors

MAX_EXPORT_BYTES = 1.5e9
MAX_QUANTIZE_BYTES = 4e9
DISK_SHARE = 0.8


def mllama(*args: object) -> dict[str, object]:
    """One command in a process of its own, whose memory is its own."""
    command = [Path(sys.executable).with_name("mllama"), *map(str, args), "--json"]
    summary: dict[str, object] = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    print(*args, summary)
    return summary


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, object]]]:
    """The FP16 bundle of as many layers as fit the disk twice, and what its export said."""
    folder = tmp_path_factory.mktemp("memory")
    free = shutil.disk_usage(folder).free * DISK_SHARE
    num_layers = max(layers for layers in range(4, 41) if 2 * size_bytes(layers) < free)
    write_random_checkpoint(folder / "checkpoint", with_layers(INSTRUCT_11B, num_layers))
    summary = mllama("export", folder / "checkpoint", folder / "bundle", "--dtype", "fp16")
    shutil.rmtree(folder / "checkpoint")
    yield folder / "bundle", summary
    shutil.rmtree(folder)


@pytest.mark.slow
def test_export_stays_within_its_memory(exported: tuple[Path, dict[str, int]]) -> None:
    assert exported[1]["peak_memory_bytes"] <= MAX_EXPORT_BYTES


@pytest.mark.slow
@pytest.mark.parametrize("args", [("int8-weight",), ("int4", "--calibration", "none")], ids=lambda args: args[0])
def test_quantising_stays_within_its_memory(args: tuple[str, ...], exported: tuple[Path, dict[str, int]]) -> None:
    output = exported[0].with_name(args[0])
    summary = mllama("quantize", exported[0], output, "--scheme", *args)
    shutil.rmtree(output)
    assert summary["peak_memory_bytes"] <= MAX_QUANTIZE_BYTES


def size_bytes(num_layers: int) -> int:
    shapes = expected_tensors(with_layers(INSTRUCT_11B, num_layers)).values()
    return 2 * sum(math.prod(shape) for shape in shapes)
