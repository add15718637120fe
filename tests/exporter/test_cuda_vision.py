"""CUDA's twin of the vision graph, on the CPU provider: there too its operators have kernels.

Against the standard graph and against transformers, on every shape of canvas.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from mllama_exporter import cuda_vision
from mllama_exporter.checkpoints.hf_config import model_config_from_hf
from mllama_exporter.cuda_vision import cuda_vision_from_graph
from mllama_exporter.graphs import vision_graph_from_config, weight_names
from mllama_runtime.backends.private_ort import session_options
from mllama_runtime.bundle import Bundle
from mllama_runtime.config import ModelConfig
from mllama_runtime.preprocessing import ImageTiles
from numpy.typing import NDArray
from reference import Reference, padded_mask

from ._checkpoints import tiny, write_checkpoint
from .test_cuda_graphs import in_standard_operators
from .test_parity import BAR, CANVASES, pictures

Arrays = dict[str, NDArray[np.generic]]
EVERY_CANVAS = pytest.mark.parametrize("canvas", CANVASES, ids=lambda canvas: f"{canvas[0]}x{canvas[1]}")


@pytest.fixture(scope="module")
def reference(miniature: Path) -> Reference:
    return Reference(miniature)


def session(path: Path) -> ort.InferenceSession:
    return ort.InferenceSession(path, session_options(log_severity_level=3))


def run(path: Path, feeds: Arrays) -> Arrays:
    opened = session(path)
    return dict(zip([output.name for output in opened.get_outputs()], opened.run(None, feeds), strict=True))


def inputs(tiles: list[ImageTiles]) -> Arrays:
    return {
        "pixel_values": np.stack([each.pixel_values for each in tiles]),
        "aspect_ratio_ids": np.array([each.aspect_ratio_id for each in tiles]),
        "aspect_ratio_mask": np.stack([each.aspect_ratio_mask for each in tiles]).astype(np.int64),
    }


def largest(left: Mapping[str, NDArray[np.generic]], right: Mapping[str, NDArray[np.generic]]) -> float:
    assert left.keys() == right.keys()
    return max(float(np.abs(left[name] - right[name].reshape(left[name].shape)).max()) for name in left)


def relative(found: Arrays, expected: Arrays) -> float:
    assert found.keys() == expected.keys()
    pairs = [(found[name].astype(np.float32), expected[name].astype(np.float32)) for name in expected]
    return max(float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)) for ours, theirs in pairs)


@EVERY_CANVAS
def test_every_canvas_matches_transformers(bundle_of, reference: Reference, canvas: tuple[int, int]) -> None:
    bundle = bundle_of()
    images = pictures(bundle, (canvas,))
    image_token_id = Bundle.open(bundle).manifest.model.image_token_id
    visibility = np.ones((3, images[0].num_tiles), np.bool_)
    cross = reference.step([image_token_id, 40, 41], images, padded_mask(visibility, images)).cross
    standard, twin = (run(bundle / name, inputs(images)) for name in ("vision.onnx", "vision.cuda.onnx"))
    assert largest(twin, cross) <= BAR
    assert largest(twin, standard) <= BAR


def test_pictures_of_different_canvases_together(bundle_of) -> None:
    bundle = bundle_of()
    images = pictures(bundle, tuple(CANVASES))
    together = run(bundle / "vision.cuda.onnx", inputs(images))
    for index, image in enumerate(images):
        alone = run(bundle / "vision.cuda.onnx", inputs([image]))
        assert largest(alone, {name: array[index] for name, array in together.items()}) <= BAR


@pytest.mark.parametrize(
    ("precision", "vision", "bar"),
    [("fp16", None, 0.005), ("int8-weight", "int8-weight", 0.005), ("int8", "int8", 0.06), ("fp8", "fp8", 0.06)],
)
def test_lower_precisions_equal_the_standard_graph(
    bundle_of, tmp_path: Path, precision: str, vision: str | None, bar: float
) -> None:
    """In their own precision, most of which the provider computes in float32.

    int8 rounds activations in the standard graph alone. Where both round, on fp8's coarse grid, the least difference
    before makes a step of it.
    """
    bundle = bundle_of(precision, vision=vision)
    feeds = inputs(pictures(bundle, ((1, 1), (1, 3), (2, 2))))
    twin = bundle / "vision.cuda.onnx"
    if vision == "fp8":
        twin = in_standard_operators(twin, tmp_path)
    assert relative(run(twin, feeds), run(bundle / "vision.onnx", feeds)) <= bar


HEADS = pytest.mark.parametrize(
    ("hidden_size", "num_heads"), [(160, 2), (32, 2), (24, 2)], ids=["80 wide", "16 wide", "12 wide"]
)


def peaked(folder: Path, hidden_size: int, num_heads: int) -> tuple[ModelConfig, Arrays]:
    """A random vision graph with attention as peaked as trained ones (scores up to 17), its twin, and inputs."""
    vision = {"hidden_size": hidden_size, "attention_heads": num_heads, "vision_output_dim": 3 * hidden_size}
    config = model_config_from_hf(write_checkpoint(folder / "checkpoint", config=tiny(vision=vision)))
    standard = vision_graph_from_config(config, torch.float32, "published")
    rng = np.random.default_rng(5)
    for name in weight_names(standard):
        value = standard.graph.initializers[name]
        drawn = rng.standard_normal(value.shape.numpy(), np.float32)  # type: ignore[union-attr]
        if drawn.ndim > 1:
            drawn *= drawn[0].size ** -0.5
        if "self_attn.q_proj" in name or "self_attn.k_proj" in name:
            drawn *= 2
        value.const_value = ir.tensor(drawn, name=name)
    ir.save(standard, folder / "vision.onnx")
    ir.save(cuda_vision_from_graph(standard, config), folder / "vision.cuda.onnx")
    side, tiles = config.vision.image_size, config.vision.max_num_tiles
    return config, {
        "pixel_values": rng.standard_normal((tiles, tiles, config.vision.num_channels, side, side), np.float32),
        "aspect_ratio_ids": np.arange(1, tiles + 1),
        "aspect_ratio_mask": np.tri(tiles, dtype=np.int64),  # one to four real tiles
    }


@HEADS
def test_peaked_attention(tmp_path: Path, hidden_size: int, num_heads: int) -> None:
    config, feeds = peaked(tmp_path, hidden_size, num_heads)
    expected, found = (run(tmp_path / name, feeds) for name in ("vision.onnx", "vision.cuda.onnx"))
    assert relative(found, expected) <= BAR
    assert len(expected) == 2 * len(config.text.cross_attention_layers)


@pytest.mark.parametrize("apart", [0.0, 0.5])
def test_padding_rows_must_not_see_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, apart: float) -> None:
    """What the comparisons above would find if the columns held too little."""
    monkeypatch.setattr(cuda_vision, "_APART", apart)
    _, feeds = peaked(tmp_path, 160, 2)
    expected, found = (run(tmp_path / name, feeds) for name in ("vision.onnx", "vision.cuda.onnx"))
    assert relative(found, expected) > 100 * BAR


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_columns_are_as_exact_as_the_mask_in_16_bits(dtype: torch.dtype) -> None:
    """As kernels compute: from 16 bits, in float32. Scores of real pairs stay the same to the bit."""
    apart, rows, width = cuda_vision._APART, 96, 80
    generator = torch.Generator().manual_seed(3)
    query, key, value = (torch.randn(rows, width, generator=generator).to(dtype) for _ in range(3))
    query, is_padding = query * 2, torch.arange(rows) % 3 == 0
    columns = (is_padding[:, None] * torch.full((rows, 8), apart)).to(dtype)
    narrow = query.float() @ key.float().T
    wide = torch.cat([query, columns], dim=1).float() @ torch.cat([key, -columns], dim=1).float().T
    forbidden = is_padding[:, None] & is_padding
    assert torch.equal(wide[~forbidden], narrow[~forbidden])
    assert (columns[is_padding].square().sum(dim=1) < torch.finfo(torch.float16).max).all()  # sums in 16 bits, too
    weights = (wide * width**-0.5).softmax(dim=-1)
    assert not weights[forbidden].any()
    masked = (narrow * width**-0.5).masked_fill(forbidden, -torch.inf).softmax(dim=-1)
    assert torch.equal(weights @ value.float(), masked @ value.float())


@pytest.mark.parametrize(
    ("precision", "vision"), [("fp32", None), ("fp16", None), ("bf16", None), ("int8", "int8"), ("fp8", "fp8")]
)
def test_the_twins_operators(bundle_of, precision: str, vision: str | None) -> None:
    bundle = Path(bundle_of(precision, vision=vision))
    model = Bundle.read(bundle).manifest.model
    graphs = (ir.load(bundle / name).graph for name in ("vision.onnx", "vision.cuda.onnx"))
    standard, twin = (Counter(node.op_type for node in graph) for graph in graphs)
    assert twin["MultiHeadAttention"] == model.vision.num_layers + model.vision.num_global_layers
    assert not any(twin[name] for name in ("Attention", "Or", "Conv", "MatMul", "QuantizeLinear", "DequantizeLinear"))
    assert twin["Transpose"] == 1 + 2 * len(model.text.cross_attention_layers)  # of patches and heads, not of matrices
    quantized = {"int8": "MatMulNBits", "fp8": "MatMulBlockQuantizedFp8Weight"}.get(precision, "")
    assert twin["FusedMatMul"] + twin[quantized] == standard["MatMul"] + 1


def test_weights_are_used_where_they_lie(bundle_of) -> None:
    def places(name: str) -> dict[str, tuple[object, ...]]:
        weights = {key: value.const_value for key, value in ir.load(bundle_of() / name).graph.initializers.items()}
        return {
            key: (weight.location, weight.offset, weight.length, weight.shape)
            for key, weight in weights.items()
            if isinstance(weight, ir.ExternalTensor)
        }

    assert places("vision.cuda.onnx") == places("vision.onnx")


def test_bf16_has_the_nodes_of_fp16(bundle_of) -> None:
    def nodes(precision: str) -> list[tuple[str, list[str | None]]]:
        graph = ir.load(bundle_of(precision) / "vision.cuda.onnx").graph
        return [(node.op_type, [value and value.name for value in node.inputs]) for node in graph]

    assert nodes("bf16") == nodes("fp16")
