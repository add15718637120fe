"""People take a bundle's graphs to Polygraphy, the field's tool: its command line, as the README gives it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from mllama_runtime.bundle import Bundle
from mllama_runtime.manifest import GraphSpec

pytest.importorskip("polygraphy")

SIZES = {"batch": 2, "cross_rows": 2, "num_logits": 1, "seq": 3, "num_tiles": 1, "cache_len": 16, "images": 1}
# Three new tokens at the start of each row; random numbers would be positions that are not there.
RANGES = ("kv_lengths:[3,3]", "write_indices:[0,0]", "logits_indices:[2,2]")


def polygraphy(*args: object) -> str:
    command = [Path(sys.executable).with_name("polygraphy"), *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def shapes(spec: GraphSpec) -> list[str]:
    """An --input-shapes argument for each input, such as cross_key_1:[2,2,17,64]."""
    sizes = []
    for tensor in spec.inputs:
        dims = []
        for dim in tensor.shape:
            factor, _, symbol = str(dim).rpartition("*")
            dims.append(int(factor or 1) * SIZES[symbol] if isinstance(dim, str) else dim)
        sizes.append(f"{tensor.name}:[{','.join(map(str, dims))}]")
    return sizes


@pytest.mark.parametrize("graph", ["vision", "decoder", "decoder_ort"])
def test_graphs_run_in_polygraphy(graph: str, bundle_of: Callable[..., Path]) -> None:
    bundle = Bundle.open(bundle_of("fp16"))
    spec = bundle.manifest.graphs[graph]  # type: ignore[index]
    ranges = ("--val-range", *RANGES) if graph != "vision" else ()
    said = polygraphy("run", bundle.path(spec.file), "--onnxrt", "--input-shapes", *shapes(spec), *ranges, "--validate")
    assert "PASSED" in said


def test_graphs_are_shown_by_polygraphy(bundle_of: Callable[..., Path]) -> None:
    bundle = Bundle.open(bundle_of("fp16"))
    said = polygraphy("inspect", "model", bundle.path("decoder.onnx"), "--show", "layers", "attrs")
    assert "ONNX Opset: 24" in said
    assert "kv_lengths [dtype=int64, shape=('batch',)]" in said
    for op_type, count in (("TensorScatter", 8), ("Attention", 6), ("RotaryEmbedding", 8)):
        assert said.count(f"[Op: {op_type}]") == count
