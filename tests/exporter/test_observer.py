"""The observer on a small graph with its weights in a file, against numpy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from mllama_exporter.observer import activation_names, observed, session_from_model
from mllama_runtime.errors import BundleError

GRAPH = """
<ir_version: 10, opset_import: ["" : 21]>
g (float[n, 4] x, int64[n] ids) => (float[n, 3] out) <float three = {3.0}> {
    turned = Transpose <perm=[1, 0]> (proj)
    hidden = MatMul (x, turned)
    looked = Gather (table, ids)
    numbers = Cast <to=1> (ids)
    angles = Mul (numbers, three)
    scaled = Mul (looked, three)
    out = Add (hidden, scaled)
}
"""
WEIGHTS = {
    "proj": np.random.default_rng(0).standard_normal((3, 4), np.float32),
    "table": np.random.default_rng(1).standard_normal((5, 3), np.float32),
}


def graph(folder: Path) -> ir.Model:
    """A graph as a bundle has it: no types inside, the weights in a file beside it."""
    model = onnx.parser.parse_model(GRAPH)
    offset = 0
    for name, array in WEIGHTS.items():
        tensor = onnx.TensorProto(name=name, data_type=onnx.TensorProto.FLOAT, dims=array.shape)
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("location", "weights.bin"), ("offset", offset), ("length", array.nbytes)):
            tensor.external_data.add(key=key, value=str(value))
        model.graph.initializer.append(tensor)
        offset += array.nbytes
    (folder / "weights.bin").write_bytes(b"".join(array.tobytes() for array in WEIGHTS.values()))
    (folder / "graph.onnx").write_bytes(model.SerializeToString())
    return ir.load(folder / "graph.onnx")


def maxima(folder: Path, model: ir.Model, x: np.ndarray) -> dict[str, float]:
    watched, outputs = observed(model, ["hidden", "looked", "scaled", "absent"])
    session = session_from_model(watched, folder)
    results = session.run(list(outputs), {"x": x, "ids": np.array([4, 0])})
    return {outputs[name]: float(value) for name, value in zip(outputs, results, strict=True)}


def test_activations_are_what_comes_from_data_and_embeddings(tmp_path: Path) -> None:
    names = activation_names(graph(tmp_path))
    assert names == {"hidden": "proj", "looked": "table", "scaled": "table", "out": "table"}


def test_maxima_are_those_of_numpy(tmp_path: Path) -> None:
    x = np.random.default_rng(2).standard_normal((2, 4), np.float32)
    looked = np.abs(WEIGHTS["table"][[4, 0]]).max()
    found = maxima(tmp_path, graph(tmp_path), x)
    assert found == pytest.approx(
        {"hidden": np.abs(x @ WEIGHTS["proj"].T).max(), "looked": looked, "scaled": 3 * looked}
    )


def test_names_that_are_absent_are_left_out_and_nothing_is_written(tmp_path: Path) -> None:
    model = graph(tmp_path)
    before = ir.to_proto(model).SerializeToString()
    assert "absent" not in maxima(tmp_path, model, np.ones((2, 4), np.float32))
    assert ir.to_proto(model).SerializeToString() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["graph.onnx", "weights.bin"]


def test_an_infinity_comes_through(tmp_path: Path) -> None:
    x = np.full((2, 4), 3e38, np.float32)
    assert maxima(tmp_path, graph(tmp_path), x)["hidden"] == np.inf


def test_a_weights_file_that_is_absent_is_refused(tmp_path: Path) -> None:
    watched, _ = observed(graph(tmp_path), ["hidden"])
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(BundleError, match="cannot load the observed graph"):
        session_from_model(watched, tmp_path)


def test_a_graph_without_types_is_a_fault_of_ours(tmp_path: Path) -> None:
    model = graph(tmp_path)
    model.graph[0].op_type = "Unheard"
    with pytest.raises(RuntimeError, match="no type could be inferred for turned"):
        activation_names(model)
