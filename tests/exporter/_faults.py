"""Planted faults: a bundle's copy is changed, and its manifest made to agree."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
from ml_dtypes import bfloat16
from mllama_runtime.bundle import Bundle
from mllama_runtime.errors import BundleError
from mllama_runtime.manifest import FileEntry
from mllama_runtime.tensorfile import read_header

DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": bfloat16}
LAYER = "language_model.model.layers."


def relist(bundle: Path, *, without: tuple[str, ...] = (), **fields: object) -> None:
    """Let the manifest say that the folder is right as it is."""
    manifest = Bundle.read(bundle).manifest
    contents = {name: (bundle / name).read_bytes() for name in manifest.files if name not in without}
    files = {name: FileEntry(len(data), hashlib.sha256(data).hexdigest()) for name, data in contents.items()}
    (bundle / "manifest.json").write_bytes(replace(manifest, files=files, **fields).to_json())


def change_weight(bundle: Path, name: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    path = bundle / "weights.safetensors"
    info = read_header(path, error=BundleError).tensors[name]
    data = bytearray(path.read_bytes())
    array = np.frombuffer(data, DTYPES[info.dtype], math.prod(info.shape), info.offset_bytes)
    array[:] = change(array.astype(np.float32)).astype(array.dtype)
    path.write_bytes(data)


def times(bundle: Path, name: str, factor: float) -> None:
    change_weight(bundle, name, lambda values: values * factor)


def slow_rotary(bundle: Path) -> None:
    """The slowest frequencies without Llama 3.1's division by eight."""
    for file in ("decoder.onnx", "decoder.ort.onnx"):
        model = onnx.load(bundle / file, load_external_data=False)
        tensor = next(tensor for tensor in model.graph.initializer if tensor.name == "inv_freq")
        values = onnx.numpy_helper.to_array(tensor).copy()
        values[-8:] *= 8
        tensor.CopyFrom(onnx.numpy_helper.from_array(values, "inv_freq"))
        onnx.save(model, bundle / file)


def swap_weights(bundle: Path, one: str, other: str) -> None:
    """Two weights of the same shape, each under the other's name."""
    tensors = read_header(bundle / "weights.safetensors", error=BundleError).tensors
    data = (bundle / "weights.safetensors").read_bytes()
    first, second = (
        np.frombuffer(data, DTYPES[info.dtype], math.prod(info.shape), info.offset_bytes)
        for info in (tensors[one], tensors[other])
    )
    change_weight(bundle, one, lambda values: second.astype(np.float32))
    change_weight(bundle, other, lambda values: first.astype(np.float32))


def shift_mask(bundle: Path) -> None:
    """Every token sees the tile before the one that it should see."""
    for file in ("decoder.onnx", "decoder.ort.onnx"):
        model = onnx.load(bundle / file, load_external_data=False)
        for node in model.graph.node:
            node.input[:] = ["shifted" if name == "cross_attention_mask" else name for name in node.input]
        bounds = {"start": 0, "last": -1, "end": 2**62, "axis": 2}
        for name, value in bounds.items():
            model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([value]), f"shift_{name}"))
        sides = {"before": ("shift_start", "shift_last"), "behind": ("shift_last", "shift_end")}
        nodes = [
            onnx.helper.make_node("Slice", ["cross_attention_mask", *edges, "shift_axis"], [side])
            for side, edges in sides.items()
        ]
        nodes.append(onnx.helper.make_node("Concat", ["behind", "before"], ["shifted"], axis=2))
        for index, node in enumerate(nodes):
            model.graph.node.insert(index, node)
        onnx.save(model, bundle / file)
