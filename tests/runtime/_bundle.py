"""A small fake bundle: real ONNX files with external data in a real safetensors file, and a hand-made manifest."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
from mllama_runtime.config import ModelConfig, RopeConfig, TextConfig, VisionConfig
from mllama_runtime.manifest import FileEntry, GraphSpec, Manifest, Source, TensorSpec, WeightStats
from mllama_runtime.tensorfile import encode_header
from onnx import ModelProto, TensorProto, helper

SHA = "0" * 64

MODEL = ModelConfig(
    vision=VisionConfig(
        hidden_size=64,
        num_heads=1,
        num_layers=3,
        num_global_layers=2,
        intermediate_size=128,
        intermediate_layers_indices=(0, 2),
        image_size=56,
        patch_size=14,
        max_num_tiles=4,
        supported_aspect_ratios=((1, 1), (1, 2), (2, 1), (2, 2)),
        norm_eps=1e-5,
        hidden_act="gelu",
    ),
    text=TextConfig(
        vocab_size=1024,
        hidden_size=192,
        num_layers=5,
        num_heads=3,
        num_kv_heads=1,
        intermediate_size=512,
        rms_norm_eps=1e-5,
        max_seq_len=2048,
        cross_attention_layers=(1, 3),
        rope=RopeConfig("llama3", 500000.0, 8.0, 1.0, 4.0, 1024),
    ),
    image_token_id=1024,
)

GRAPH_IO = {
    "inputs": (TensorSpec("x", "float32", ("batch", 4)),),
    "outputs": (TensorSpec("y", "float32", ("batch", 4)),),
}

MANIFEST = Manifest(
    name="fake",
    model=MODEL,
    mask_semantics="hf",
    vision_states="published",
    precision="fp32",
    graphs={
        "vision": GraphSpec("vision.onnx", **GRAPH_IO),
        "decoder": GraphSpec(
            "decoder.onnx",
            (
                *GRAPH_IO["inputs"],
                *(TensorSpec(f"past_key_{layer}", "float32", ("batch", 1, 64)) for layer in (0, 2, 4)),
            ),
            GRAPH_IO["outputs"],
        ),
        "greedy": GraphSpec("vision.onnx", **GRAPH_IO),  # there must be one
        "sampler": GraphSpec("vision.onnx", **GRAPH_IO),
    },
    files={},
    tools={"mllama-deploy": "0.1.0", "onnx": "1.23.2"},
    source=Source("f" * 64, "hf", 2, 32, {"model.safetensors": FileEntry(200, SHA)}),
    options={"dtype": "fp32", "layers": None, "clamp": False},
    weights=WeightStats(num_clamped=0, num_nonfinite=0, largest_abs=1.5),
)

# The matrices of the two graphs: x -> x @ W, with W = identity * 2 and identity * 3.
WEIGHTS = {"vision.w": 2 * np.eye(4, dtype="<f4"), "decoder.w": 3 * np.eye(4, dtype="<f4")}


def safetensors_bytes(weights: dict[str, np.ndarray]) -> tuple[bytes, dict[str, int]]:
    """A safetensors file, and the offset of each tensor in it."""
    header, infos = encode_header((name, "F32", array.shape) for name, array in weights.items())
    data = header + b"".join(weights[info.name].tobytes() for info in infos)
    return data, {info.name: info.offset_bytes for info in infos}


def external(name: str, entries: dict[str, str]) -> TensorProto:
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[4, 4], data_location=TensorProto.EXTERNAL)
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=value)
    return tensor


def graph_model(weight: TensorProto) -> ModelProto:
    """y = x @ weight."""
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 4]) for name in "xy")
    graph = helper.make_graph([helper.make_node("MatMul", ["x", weight.name], ["y"])], "g", [x], [y], [weight])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def entry_of(path: Path) -> FileEntry:
    data = path.read_bytes()
    return FileEntry(len(data), hashlib.sha256(data).hexdigest())


def fill(folder: Path) -> None:
    """Every file of the fake bundle but the manifest."""
    data, offsets = safetensors_bytes(WEIGHTS)
    (folder / "weights.safetensors").write_bytes(data)
    for key in ("vision", "decoder"):
        place = {"location": "weights.safetensors", "offset": f"{offsets[f'{key}.w']}", "length": "64"}
        (folder / f"{key}.onnx").write_bytes(graph_model(external(f"{key}.w", place)).SerializeToString())
    (folder / "tokenizer.json").write_text('{"version": "1.0"}\n')
    (folder / "LICENSE").write_text("A licence.\n")


def list_files(folder: Path, manifest: Manifest = MANIFEST) -> Manifest:
    """Write the manifest that says the folder is right as it is."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    listed = replace(manifest, files={name: entry_of(folder / name) for name in names if name != "manifest.json"})
    (folder / "manifest.json").write_bytes(listed.to_json())
    return listed


def make_bundle(folder: Path) -> Path:
    folder.mkdir(parents=True)
    fill(folder)
    list_files(folder)
    return folder
