"""The twin against the standard decoder on arbitrary inputs, node for node where it matters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from mllama_exporter import cuda_decoder
from mllama_exporter.checkpoints.hf_config import model_config_from_hf
from mllama_exporter.cuda_decoder import cuda_decoder_from_graph
from mllama_exporter.graphs import decoder_graph_from_config, weight_names
from mllama_exporter.ort_graphs import ort_graph_from_graph
from mllama_runtime.bundle import Bundle
from mllama_runtime.config import ModelConfig

from ._checkpoints import tiny, write_checkpoint
from ._steps import BAR, inputs


@pytest.fixture(scope="module")
def model(bundle_of) -> ModelConfig:
    return Bundle.open(bundle_of()).manifest.model


@pytest.fixture(scope="module", params=["hf", "meta"])
def sessions(request: pytest.FixtureRequest, bundle_of) -> tuple[ort.InferenceSession, ort.InferenceSession]:
    bundle = bundle_of("fp32", request.param)
    options = ort.SessionOptions()
    options.log_severity_level = 3  # unbound caches are copied, and ONNX Runtime says so for each
    options.intra_op_num_threads = 1
    return tuple(ort.InferenceSession(bundle / name, options) for name in ("decoder.onnx", "decoder.ort.onnx"))


@pytest.mark.parametrize(("lengths", "seq"), [([0], 9), ([7], 5), ([20], 1), ([13, 2, 30], 1), ([0, 0, 0], 4)], ids=str)
def test_twin_equals_standard(sessions, model: ModelConfig, lengths: list[int], seq: int) -> None:
    feeds = inputs(model, lengths, seq, 2)
    standard, twin = (session.run(None, feeds) for session in sessions)
    names = [output.name for output in sessions[0].get_outputs()]
    assert names == [output.name for output in sessions[1].get_outputs()]
    for name, expected, found in zip(names, standard, twin, strict=True):
        for row, length in enumerate(lengths):  # behind the valid entries a cache may hold anything
            valid = slice(None) if name == "logits" else (slice(None), slice(0, length + seq))
            assert np.abs(expected[row][valid] - found[row][valid]).max() <= BAR, name


def test_a_row_without_picture_takes_nothing_from_cross_attention(sessions, model: ModelConfig) -> None:
    feeds = inputs(model, [4, 4], 1, 2)
    feeds["has_image"] = np.array([True, False])
    clean = [session.run(["logits"], feeds)[0] for session in sessions]
    for name in feeds:
        if name.startswith(("cross_key", "cross_value")):
            feeds[name][1] = np.nan
    for session, before in zip(sessions, clean, strict=True):
        after = session.run(["logits"], feeds)[0]
        assert np.array_equal(after, before)
        assert np.isfinite(after).all()


def test_a_masked_tile_changes_nothing(sessions, model: ModelConfig) -> None:
    feeds = inputs(model, [4], 3, 2)
    feeds["cross_attention_mask"][:] = [True, False]
    clean = [session.run(["logits"], feeds)[0] for session in sessions]
    for name in feeds:
        if name.startswith(("cross_key", "cross_value")):
            feeds[name][:, :, model.vision.num_patches :] *= 5
    for session, before in zip(sessions, clean, strict=True):
        assert np.array_equal(session.run(["logits"], feeds)[0], before)


@pytest.mark.parametrize("num_rows", [0, 1, 2])
def test_only_the_first_rows_go_through_cross_attention(sessions, model: ModelConfig, num_rows: int) -> None:
    """Rows that keys and values end before count as text, and a batch of text has none at all."""
    feeds = inputs(model, [4, 9, 6], 1, 2)
    feeds["has_image"] = np.arange(3) < num_rows
    (expected,) = sessions[0].run(["logits"], feeds)
    cross = {name: array[:num_rows] for name, array in feeds.items() if name.startswith(("cross_key", "cross_value"))}
    for session in sessions[1:] if num_rows == 0 else sessions:  # the standard operator refuses to have no row
        (found,) = session.run(["logits"], feeds | cross)
        assert np.abs(expected - found).max() <= BAR


def test_logits_of_several_tokens(sessions, model: ModelConfig) -> None:
    feeds = inputs(model, [11], 4, 2)
    for session in sessions:
        alone = [session.run(["logits"], feeds | {"logits_indices": np.array([[i]])})[0] for i in (3, 0, 2)]
        together = session.run(["logits"], feeds | {"logits_indices": np.array([[3, 0, 2]])})[0]
        assert np.abs(np.concatenate(alone, axis=1) - together).max() <= BAR
        assert np.abs(alone[0] - alone[1]).max() > 100 * BAR


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_twins_operators(bundle_of, model: ModelConfig, precision: str) -> None:
    def operators(name: str) -> Counter[str]:
        graph = onnx.load(Path(bundle_of(precision)) / name, load_external_data=False).graph
        return Counter(node.op_type for node in graph.node)

    standard, twin = operators("decoder.onnx"), operators("decoder.ort.onnx")
    num_self = len(model.text.self_attention_layers)
    assert standard["Attention"] == model.text.num_layers
    assert standard["TensorScatter"] == 2 * num_self
    assert twin["GroupQueryAttention"] == num_self
    assert twin["FusedMatMul"] == len(model.text.cross_attention_layers)
    assert twin["Attention"] == twin["TensorScatter"] == 0
    assert operators("vision.ort.onnx")["Attention"] == model.vision.num_layers + model.vision.num_global_layers


@pytest.mark.parametrize("twin_from_graph", [ort_graph_from_graph, cuda_decoder_from_graph])
def test_heads_of_a_size_that_the_kernel_does_not_take(
    tmp_path: Path, twin_from_graph: Callable[[ir.Model, ModelConfig], ir.Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX Runtime refuses them when it runs; a session over the twin of such a model runs it all the same."""
    monkeypatch.setattr(cuda_decoder, "GROUPED_DTYPES", (ir.DataType.FLOAT,))
    folder = write_checkpoint(tmp_path / "checkpoint", config=tiny(text={"hidden_size": 24}))
    config = model_config_from_hf(folder)
    standard = decoder_graph_from_config(config, torch.float32, "hf")
    weights = {name: standard.graph.initializers[name] for name in weight_names(standard)}
    rng = np.random.default_rng(1)
    for name, value in weights.items():
        value.const_value = ir.tensor(rng.standard_normal(value.shape.numpy(), np.float32) * 0.1, name=name)
    sessions = []
    for name, graph in (("standard", standard), ("twin", twin_from_graph(standard, config))):
        ir.save(graph, tmp_path / f"{name}.onnx")
        sessions.append(ort.InferenceSession(tmp_path / f"{name}.onnx"))
    feeds = inputs(config, [7, 3], 1, 2)
    expected, found = (session.run(["logits"], feeds)[0] for session in sessions)
    assert np.abs(expected - found).max() <= BAR
