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
g (float[n, 4] x, int64[n] ids, bool flag) => (float[n, 3] out) <float three = {3.0}> {
    turned = Transpose <perm=[1, 0]> (proj)
    hidden = MatMul (x, turned)
    looked = Gather (table, ids)
    numbers = Cast <to=1> (ids)
    angles = Mul (numbers, three)
    %s
    out = Add (hidden, scaled)
}
"""
STANDARD = "scaled = Mul (looked, three)"
TWIN = """scaled = If (flag) <
    then_branch = yes () => (float[n, 3] inside) { tripled = Mul (looked, three) inside = Identity (tripled) },
    else_branch = no () => (float[n, 3] outside) { outside = Identity (hidden) }
>"""
WEIGHTS = {
    "proj": np.random.default_rng(0).standard_normal((3, 4), np.float32),
    "table": np.random.default_rng(1).standard_normal((5, 3), np.float32),
}


def graph(folder: Path, middle: str) -> ir.Model:
    """A graph as a bundle has it: no types inside, the weights in a file beside it."""
    model = onnx.parser.parse_model(GRAPH % middle)
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


def maxima(folder: Path, model: ir.Model, x: np.ndarray, *, flag: bool = True) -> dict[str, float]:
    watched, outputs = observed(model, ["hidden", "looked", "scaled", "tripled", "inside", "absent"])
    session = session_from_model(watched, folder)
    results = session.run(list(outputs), {"x": x, "ids": np.array([4, 0]), "flag": np.array(flag)})
    return {outputs[name]: float(value) for name, value in zip(outputs, results, strict=True)}


def test_activations_are_what_comes_from_data_and_embeddings(tmp_path: Path) -> None:
    names = activation_names(graph(tmp_path, STANDARD))
    assert names == {"hidden": "proj", "looked": "table", "scaled": "table", "out": "table"}


def test_maxima_are_those_of_numpy(tmp_path: Path) -> None:
    x = np.random.default_rng(2).standard_normal((2, 4), np.float32)
    looked = np.abs(WEIGHTS["table"][[4, 0]]).max()
    found = maxima(tmp_path, graph(tmp_path, STANDARD), x)
    assert found == pytest.approx(
        {"hidden": np.abs(x @ WEIGHTS["proj"].T).max(), "looked": looked, "scaled": 3 * looked}
    )


@pytest.mark.parametrize("flag", [True, False])
def test_what_stands_in_a_branch_is_seen(tmp_path: Path, flag: bool) -> None:
    model = graph(tmp_path, TWIN)
    before = ir.to_proto(model).SerializeToString()
    found = maxima(tmp_path, model, np.ones((2, 4), np.float32), flag=flag)
    largest = 3 * np.abs(WEIGHTS["table"][[4, 0]]).max()
    assert found["tripled"] == found["inside"] == pytest.approx(largest)
    assert "scaled" not in found  # the branch's own tensor stands for it
    assert ir.to_proto(model).SerializeToString() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["graph.onnx", "weights.bin"]


def test_an_infinity_comes_through(tmp_path: Path) -> None:
    x = np.full((2, 4), 3e38, np.float32)
    assert maxima(tmp_path, graph(tmp_path, STANDARD), x)["hidden"] == np.inf


def test_a_weights_file_that_is_absent_is_refused(tmp_path: Path) -> None:
    watched, _ = observed(graph(tmp_path, STANDARD), ["hidden"])
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(BundleError, match="cannot load the observed graph"):
        session_from_model(watched, tmp_path)


def test_a_graph_without_types_is_a_fault_of_ours(tmp_path: Path) -> None:
    model = graph(tmp_path, STANDARD)
    model.graph[0].op_type = "Unheard"
    with pytest.raises(RuntimeError, match="no type could be inferred for turned"):
        activation_names(model)
