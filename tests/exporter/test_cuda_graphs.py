"""CUDA's twin of the decoder against the standard one, on the CPU provider: there too its operators have kernels.

Not all in every type: attention is compared tightly in float32, where the real twin leaves it as it was, and what has
no kernel at all is put back into standard operators first.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from mllama_exporter import cuda_decoder
from mllama_exporter.cuda_decoder import cuda_decoder_from_graph
from mllama_exporter.graph_edit import Builder, replace
from mllama_exporter.modules.text import inverse_frequencies
from mllama_runtime.backends.private_ort import session_options
from mllama_runtime.bundle import Bundle
from mllama_runtime.config import ModelConfig
from onnx_ir.passes.common import RemoveUnusedNodesPass

from ._steps import BAR, inputs

Sessions = tuple[ort.InferenceSession, ort.InferenceSession]
Lengths = list[int]
PRECISIONS = ("fp32", "fp16", "bf16", "int8-weight", "int4", "int8", "fp8")
QUANTIZED = {"int8-weight": "MatMulNBits", "int4": "MatMulNBits", "int8": "MatMulNBits"}
QUANTIZED["fp8"] = "MatMulBlockQuantizedFp8Weight"
STEPS = pytest.mark.parametrize(("lengths", "seq"), [([0], 9), ([7], 5), ([20], 1), ([13, 2, 30], 1)], ids=str)


@pytest.fixture(scope="module")
def model(bundle_of) -> ModelConfig:
    return Bundle.open(bundle_of()).manifest.model


@pytest.fixture(scope="module")
def grouped(tmp_path_factory: pytest.TempPathFactory, bundle_of) -> Callable[..., Sessions]:
    """The standard decoder in float32, and the twin with the rewrites of 16-bit precisions in that type."""

    def make(bundle: Path) -> Sessions:
        folder = tmp_path_factory.mktemp("grouped")
        for path in bundle.glob("weights*"):
            shutil.copy(path, folder)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cuda_decoder, "GROUPED_DTYPES", (ir.DataType.FLOAT,))
            twin = cuda_decoder_from_graph(ir.load(bundle / "decoder.onnx"), Bundle.read(bundle).manifest.model)
        ir.save(twin, folder / "twin.onnx")
        return session(bundle / "decoder.onnx"), session(folder / "twin.onnx")

    return make


@pytest.fixture(scope="module", params=["hf", "meta"])
def sessions(request: pytest.FixtureRequest, grouped, bundle_of) -> Sessions:
    return grouped(bundle_of("fp32", request.param))


def session(path: Path) -> ort.InferenceSession:
    return ort.InferenceSession(path, session_options(log_severity_level=3))  # unbound caches are copied, with a notice


def operators(graph: ir.Graph) -> Counter[str]:
    return Counter(node.op_type for node in graph)


@STEPS
def test_grouped_attention_equals_the_standard_graph(sessions: Sessions, model: ModelConfig, lengths, seq) -> None:
    feeds = inputs(model, lengths, seq, 2)
    names = [output.name for output in sessions[0].get_outputs()]
    assert names == [output.name for output in sessions[1].get_outputs()]
    for name, expected, found in zip(names, *(each.run(None, feeds) for each in sessions), strict=True):
        for row, length in enumerate(lengths):  # behind the valid entries a cache may hold anything
            valid = slice(None) if name == "logits" else (slice(None), slice(0, length + seq))
            assert np.abs(expected[row][valid] - found[row][valid]).max() <= BAR, name


@pytest.mark.parametrize("num_rows", [0, 1, 2])
def test_rows_of_text_beside_pictures(sessions: Sessions, model: ModelConfig, num_rows: int) -> None:
    feeds = inputs(model, [4, 9, 6], 1, 2)
    feeds["has_image"] = np.arange(3) < num_rows
    (expected,) = sessions[0].run(["logits"], feeds)  # the standard operator refuses to have no row
    cross = {name: array[:num_rows] for name, array in feeds.items() if name.startswith(("cross_key", "cross_value"))}
    (found,) = sessions[1].run(["logits"], feeds | cross)
    assert np.abs(expected - found).max() <= BAR


def test_the_table_of_rotations(bundle_of, model: ModelConfig, tmp_path: Path) -> None:
    """Of every position that the model knows, in float32 before it is rounded."""
    bundle = bundle_of("fp16")
    twin = ir.load(bundle / "decoder.cuda.onnx")
    tables = next(node for node in twin.graph if node.op_type == "GroupQueryAttention").inputs[7:9]
    twin.graph.outputs.clear()
    twin.graph.outputs.extend(table for table in tables if table is not None)
    for table in twin.graph.outputs:
        table.type = ir.TensorType(ir.DataType.FLOAT16)
    RemoveUnusedNodesPass()(twin)
    twin.graph.inputs.clear()
    ir.save(twin, tmp_path / "tables.onnx")
    found = session(tmp_path / "tables.onnx").run(None, {})
    frequencies = inverse_frequencies(model.text.rope, model.text.head_dim).numpy()
    angles = (np.arange(model.text.max_seq_len, dtype=np.float32)[:, None] * frequencies).astype(np.float64)
    for table, expected in zip(found, (np.cos(angles), np.sin(angles)), strict=True):
        assert table.dtype == np.float16
        assert np.abs(table - expected).max() <= 2**-11  # half a step of the type below one, and a little


def test_logits_of_several_tokens(sessions: Sessions, model: ModelConfig) -> None:
    feeds = inputs(model, [11], 4, 2)
    wanted = {"logits_indices": np.array([[3, 0, 2]])}
    expected, found = (each.run(["logits"], feeds | wanted)[0] for each in sessions)
    assert np.abs(expected - found).max() <= BAR
    feeds = inputs(model, [11, 3], 1, 2)  # of several rows
    expected, found = (each.run(["logits"], feeds | {"logits_indices": np.zeros((2, 3), int)})[0] for each in sessions)
    assert np.abs(expected - found).max() <= BAR


def test_query_key_and_value_are_one_product(bundle_of, model: ModelConfig) -> None:
    """By one matrix, which is the three as they lie in the weights file."""
    bundle = bundle_of("fp16")
    standard, twin = (ir.load(bundle / name).graph for name in ("decoder.onnx", "decoder.cuda.onnx"))
    for layer in model.text.self_attention_layers:
        names = [f"language_model.model.layers.{layer}.self_attn.{which}_proj.weight" for which in "qkv"]
        parts = [standard.initializers[name].const_value for name in names]
        whole = twin.initializers[f"{names[0]}_and_{names[-1]}"].const_value
        assert not any(name in twin.initializers for name in names)
        assert whole is not None
        assert np.array_equal(whole.numpy(), np.concatenate([part.numpy() for part in parts if part is not None]))


@pytest.mark.parametrize(("name", "instead"), [("_whole", "cuda_products"), ("one_product", "cuda_decoder")])
def test_matrices_that_lie_apart(
    grouped, bundle_of, model: ModelConfig, monkeypatch: pytest.MonkeyPatch, name: str, instead: str
) -> None:
    """Joined at load, or three products after all."""
    monkeypatch.setattr(f"mllama_exporter.{instead}.{name}", lambda graph, values: None)
    sessions = grouped(bundle_of())
    feeds = inputs(model, [13, 2, 30], 1, 2)
    expected, found = (each.run(["logits"], feeds)[0] for each in sessions)
    assert np.abs(expected - found).max() <= BAR


@pytest.mark.parametrize("precision", [each for each in PRECISIONS if each not in ("bf16", "int8")])
def test_the_twin_equals_the_standard_graph(bundle_of, model: ModelConfig, precision: str, tmp_path: Path) -> None:
    """In its own precision, most of which the provider computes in float32: one rounding more or less.

    That flips steps of the coarse grid that fp8 rounds activations to, which costs less than the grid itself. bfloat16
    has no kernels here.
    """
    bundle = Path(bundle_of(precision))
    twin = bundle / "decoder.cuda.onnx"
    if precision == "fp8":
        twin = in_standard_operators(twin, tmp_path)
    expected, bar = logits(bundle / "decoder.onnx", model), BAR if precision == "fp32" else 0.005
    if precision == "fp8":
        bar = 0.8 * distance(expected, logits(bundle_of("fp16") / "decoder.onnx", model))
        assert bar < 0.1
    assert distance(logits(twin, model), expected) <= bar
    specs = Bundle.read(bundle).manifest.graphs["decoder_cuda"].inputs
    dtypes = {spec.dtype for spec in specs if spec.name.startswith(("past_", "cross_key", "cross_value"))}
    assert dtypes == {"float32" if precision == "fp32" else "float16"}


def test_int8_is_nearer_to_its_source_than_the_scheme_is(bundle_of, model: ModelConfig) -> None:
    """Its activations are rounded in the standard graph alone."""
    source = logits(bundle_of("fp16") / "decoder.onnx", model)
    scheme, twin = (
        distance(logits(bundle_of("int8") / f"decoder{kind}.onnx", model), source) for kind in ("", ".cuda")
    )
    assert twin <= 0.8 * scheme  # measured 0.4 and 0.6 of it


def logits(path: Path, model: ModelConfig) -> np.ndarray:
    opened = session(path)
    wide = any(each.name.startswith("past_") and each.type == "tensor(float)" for each in opened.get_inputs())
    feeds = inputs(model, [13, 2, 30], 1, 2)
    feeds = {name: a if wide or a.dtype != np.float32 else a.astype(np.float16) for name, a in feeds.items()}
    return opened.run(["logits"], feeds)[0]


def distance(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def in_standard_operators(twin: Path, folder: Path) -> Path:
    """Products by fp8 weights as their documentation defines them: both sides on the grid, times their scales."""
    model = ir.load(twin)
    for node in [node for node in model.graph if node.op_type == QUANTIZED["fp8"]]:
        activation, weight, scales, step = node.inputs
        assert node.attributes["block_size"].as_int() == weight.shape[1]  # type: ignore[union-attr,index]
        build = Builder(model.graph, node, f"{node.name}_standard")
        wide = build.add("Div", [build.add("Cast", [activation], {"to": ir.DataType.FLOAT}), step])
        rounded = build.add("Cast", [build.add("Cast", [wide], {"to": ir.DataType.FLOAT8E4M3FN})], {"to": 1})
        spread = build.add("Mul", [build.add("Cast", [weight], {"to": ir.DataType.FLOAT}), scales])
        turned = build.add("Transpose", [spread], {"perm": [1, 0]})
        product = build.add("MatMul", [build.add("Mul", [rounded, step]), turned])
        replace(node.outputs[0], build.add("Cast", [product], {"to": ir.DataType.FLOAT16}))
        model.graph.remove(node, safe=True)
    for path in twin.parent.glob("weights*"):
        shutil.copy(path, folder)
    ir.save(model, folder / twin.name)
    return folder / twin.name


def test_products_by_fp8_weights(bundle_of, model: ModelConfig, tmp_path: Path) -> None:
    """The first ones, whose input is the same."""
    bundle = Path(bundle_of("fp8"))
    paths = bundle / "decoder.onnx", in_standard_operators(bundle / "decoder.cuda.onnx", tmp_path)
    names = [node.outputs[0].name for node in ir.load(paths[0]).graph if node.op_type == "MatMul"][:3]
    found = []
    for path in paths:
        graph = ir.load(path)
        values = {value.name: value for node in graph.graph for value in node.outputs}
        for name in names:
            values[name].type = ir.TensorType(ir.DataType.FLOAT16)
            graph.graph.outputs.append(values[name])
        for weights in bundle.glob("weights*"):
            shutil.copy(weights, tmp_path)
        ir.save(graph, tmp_path / "products.onnx")
        feeds = inputs(model, [13, 2, 30], 1, 2)
        feeds = {
            name: array.astype(np.float16) if array.dtype == np.float32 else array for name, array in feeds.items()
        }
        found.append(session(tmp_path / "products.onnx").run(names, feeds))
    for expected, product in zip(*found, strict=True):
        assert np.linalg.norm(product - expected) <= 0.001 * np.linalg.norm(expected)


def test_bf16_has_the_nodes_of_fp16(bundle_of) -> None:
    def nodes(precision: str) -> list[tuple[str, list[str | None]]]:
        graph = ir.load(bundle_of(precision) / "decoder.cuda.onnx").graph
        return [(node.op_type, [value and value.name for value in node.inputs]) for node in graph]

    assert nodes("bf16") == nodes("fp16")


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_twins_operators(bundle_of, model: ModelConfig, precision: str) -> None:
    graphs = (ir.load(bundle_of(precision) / f"decoder{kind}.onnx").graph for kind in ("", ".cuda"))
    standard, twin = (operators(graph) for graph in graphs)
    num_self, num_cross = len(model.text.self_attention_layers), len(model.text.cross_attention_layers)
    num_grouped = 0 if precision == "fp32" else num_self
    assert twin["GroupQueryAttention"] == num_grouped
    assert twin["Attention"] == num_self - num_grouped
    assert twin["TensorScatter"] == 2 * twin["Attention"]
    assert twin["RotaryEmbedding"] == 2 * twin["Attention"]
    assert twin["Transpose"] == 2 * num_cross + 4 * twin["Attention"]  # of heads; none of matrices
    assert twin["SkipSimplifiedLayerNormalization"] + twin["RMSNormalization"] == standard["RMSNormalization"]
    assert twin["SkipSimplifiedLayerNormalization"] >= model.text.num_layers
    products = standard["MatMul"] - (0 if precision == "fp8" else 2 * num_grouped)
    assert twin[QUANTIZED.get(precision, "FusedMatMul")] == products + (num_cross if precision not in QUANTIZED else 0)
    assert twin["MatMul"] == num_cross
    assert twin["QuantizeLinear"] == twin["DequantizeLinear"] == 0
