"""What stands between an engine file and its deserialisation: hashes, keys, versions, GPUs. No TensorRT is involved."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from mllama_runtime.bundle import Bundle
from mllama_runtime.engine_record import (
    RECORD_NAME,
    EngineInputs,
    EngineRecord,
    Finding,
    GraphEngine,
    Kernel,
    Limits,
    Profile,
    ShapeRange,
    engine_from_bundle,
    graph_hashes,
    weights_hashes,
)
from mllama_runtime.errors import BundleError
from mllama_runtime.manifest import EngineEntry, Validation

from ._bundle import list_files, make_bundle

GRAPHS = ("vision", "decoder", "greedy", "sampler")
CONTENT = {graph: f"native code {index}".encode() for index, graph in enumerate(GRAPHS, start=1)}


def inputs_of(bundle: Bundle, **changes: object) -> EngineInputs:
    inputs = EngineInputs(
        backend="tensorrt-rtx",
        version="1.7.1",
        compute_capabilities=("8.9",),
        graphs=graph_hashes(bundle.manifest),
        weights=weights_hashes(bundle.manifest),
        limits=Limits(4, 512, 64, 4),
        strip_weights=False,
        weight_streaming=False,
        rules=1,
    )
    return replace(inputs, **changes)  # type: ignore[arg-type]


def record_of(inputs: EngineInputs) -> EngineRecord:
    """A record such as a build writes; the engines' content is a stand-in."""
    key = inputs.key()
    engines = {
        graph: GraphEngine(
            file=f"engines/{key}/{graph}.engine",
            size_bytes=len(content),
            weights_bytes=8,
            activation_bytes=16,
            profiles=(Profile("decode", {"x": ShapeRange((1, 4), (2, 4), (4, 4))}),),
            findings=(Finding("inputs", "all 1 inputs are used"),),
            warnings=(),
            kernels=(Kernel("MatMul_0", "gemm", "gemm_0x1", ("MatMul_0",), ("Half",), ("Half",)),),
        )
        for graph, content in CONTENT.items()
    }
    return EngineRecord(key, inputs, "fp32", engines)  # type: ignore[arg-type]


def add(bundle: Bundle, record: EngineRecord, content: dict[str, bytes] = CONTENT) -> Bundle:
    folder = bundle.root / "engines" / ".new.partial-00000000"
    folder.mkdir(parents=True)
    for graph, data in content.items():
        (folder / f"{graph}.engine").write_bytes(data)
    (folder / RECORD_NAME).write_bytes(record.to_json())
    files = tuple(f"engines/{record.key}/{name}" for name in (*(f"{graph}.engine" for graph in content), RECORD_NAME))
    return bundle.add_engine(folder, EngineEntry(record.key, record.inputs.backend, files))


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return Bundle.open(make_bundle(tmp_path / "bundle"))


def find(bundle: Bundle, version: str = "1.7.1", compute_capability: str | None = "8.9") -> bytes:
    opened = Bundle.open(bundle.root)
    engine = engine_from_bundle(opened, "tensorrt-rtx", version=version, compute_capability=compute_capability)
    return engine.read("decoder")


def test_a_right_engine_is_given_out(bundle: Bundle) -> None:
    record = record_of(inputs_of(bundle))
    added = add(bundle, record)
    assert EngineRecord.from_json(record.to_json(), "here") == record
    assert find(added) == CONTENT["decoder"]
    assert find(added, compute_capability=None) == CONTENT["decoder"]
    assert added.verify(full=True).problems == ()
    assert not {"tensorrt", "tensorrt_rtx"} & sys.modules.keys() or "mllama_exporter" in sys.modules


def test_the_key_holds_everything_an_engine_depends_on(bundle: Bundle) -> None:
    base = inputs_of(bundle)
    changes: list[dict[str, object]] = [
        {"backend": "tensorrt"},
        {"version": "1.7.2"},
        {"compute_capabilities": ()},
        {"graphs": {**base.graphs, "decoder": "0" * 64}},
        {"weights": {"weights.safetensors": "0" * 64}},
        {"limits": replace(base.limits, max_seq_len=513)},
        {"strip_weights": True},
        {"weight_streaming": True},
        {"rules": 2},
    ]
    keys = {base.key(), *(replace(base, **change).key() for change in changes)}  # type: ignore[arg-type]
    assert len(keys) == 1 + len(changes)
    assert inputs_of(bundle).key() == base.key()


def test_none_at_all_says_how_to_make_one(bundle: Bundle) -> None:
    with pytest.raises(BundleError, match=r"has no engine for tensorrt-rtx; run: mllama build BUNDLE"):
        find(bundle)


def test_an_engine_keeps_the_verdict_and_the_other_engines(bundle: Bundle) -> None:
    verdict = Validation("pass", "reports/validation.json", 3, 0, "the model")
    stamped = bundle.stamp(verdict, {"reports/validation.json": b"{}"})
    first, second = record_of(inputs_of(bundle)), record_of(inputs_of(bundle, strip_weights=True))
    add(stamped, first)
    added = add(bundle, second)  # by somebody who opened the bundle before the verdict and the first engine came
    assert added.manifest.validation == verdict
    assert [entry.key for entry in added.manifest.engines] == [first.key, second.key]
    assert Bundle.open(bundle.root) == added


def test_a_verdict_keeps_the_engines_that_came_meanwhile(bundle: Bundle) -> None:
    added = add(bundle, record_of(inputs_of(bundle)))
    verdict = Validation("pass", "reports/validation.json", 3, 0, "the model")
    stamped = bundle.stamp(verdict, {"reports/validation.json": b"{}"})  # opened before the engine came
    assert stamped.manifest.engines == added.manifest.engines
    assert stamped.verify(full=True).problems == ()


@pytest.mark.parametrize(
    "content", [b"", b"random bytes\x00\xff", b"native code X"], ids=["empty", "random", "same size"]
)
def test_a_changed_engine_file_is_refused(bundle: Bundle, content: bytes) -> None:
    added = add(bundle, record_of(inputs_of(bundle)))
    path = added.path(added.manifest.engines[0].files[1])
    path.write_bytes(content)
    with pytest.raises(BundleError, match=r"decoder\.engine"):
        find(added)
    engine = engine_from_bundle(added, "tensorrt-rtx", version="1.7.1")  # opened before the change
    with pytest.raises(BundleError, match="not the engine that was built"):
        engine.read("decoder")
    path.unlink()
    with pytest.raises(BundleError, match="cannot be read"):
        engine.read("decoder")


def test_an_empty_engine_is_refused_even_when_it_is_listed(bundle: Bundle) -> None:
    added = add(bundle, record_of(inputs_of(bundle)), CONTENT | {"decoder": b""})
    with pytest.raises(BundleError, match=r"not the engine that was built.*0 bytes"):
        find(added)


def test_an_engine_of_other_weights_is_refused(bundle: Bundle) -> None:
    """The same graphs over other weights: another model of the same shape."""
    added = add(bundle, record_of(inputs_of(bundle)))
    path = bundle.root / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    list_files(bundle.root, added.manifest)
    with pytest.raises(BundleError, match="built from other graphs or weights"):
        find(bundle)


def test_an_engine_of_another_graph_is_refused(bundle: Bundle) -> None:
    add(bundle, record_of(inputs_of(bundle, graphs={graph: f"{index}" * 64 for index, graph in enumerate(GRAPHS)})))
    with pytest.raises(BundleError, match="built from other graphs or weights"):
        find(bundle)


def test_another_version_and_another_gpu_are_refused(bundle: Bundle) -> None:
    add(bundle, record_of(inputs_of(bundle)))
    with pytest.raises(BundleError, match=r"another version: expected 1\.8\.0, found 1\.7\.1; run: mllama build"):
        find(bundle, version="1.8.0")
    with pytest.raises(BundleError, match=r"other GPUs: expected compute capability 12\.0, found one for 8\.9"):
        find(bundle, compute_capability="12.0")
    add(bundle, record_of(inputs_of(bundle, compute_capabilities=())))
    assert find(bundle, compute_capability="12.0")  # the newer one is for all


def test_an_engine_moved_to_another_bundle_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    """Even when its files are listed there by a manifest made for it."""
    record = record_of(inputs_of(bundle))
    other = make_bundle(tmp_path / "other")
    path = other / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    list_files(other)
    add(Bundle.open(other), record)
    with pytest.raises(BundleError, match="built from other graphs or weights"):
        find(Bundle.open(other))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda value: value | {"schema_version": 2}, "unknown schema version: expected 1, found 2"),
        (lambda value: value | {"key": "0" * 64}, "not that of its inputs"),
        (lambda value: value | {"inputs": value["inputs"] | {"rules": 9}}, "not that of its inputs"),
        (lambda value: value | {"engines": {"vision": value["engines"]["vision"]}}, "found no decoder"),
        (lambda value: value | {"engines": {}}, "found no decoder"),
        (lambda value: value | {"surprise": 1}, "the field is unknown"),
        (lambda value: [value], "unknown schema version"),
    ],
)
def test_a_wrong_record_names_what_is_wrong(bundle: Bundle, damage: object, message: str) -> None:
    record = record_of(inputs_of(bundle))
    value = json.loads(record.to_json())
    with pytest.raises(BundleError, match=message):
        EngineRecord.from_json(json.dumps(damage(value)).encode(), "engine.json")  # type: ignore[operator]


def test_a_record_that_names_other_files_is_refused(bundle: Bundle) -> None:
    record = record_of(inputs_of(bundle))
    stray = replace(record.engines["decoder"], file="weights.safetensors")
    add(bundle, replace(record, engines={**record.engines, "decoder": stray}))
    with pytest.raises(BundleError, match="names a file of something else"):
        find(bundle)


def test_a_record_of_another_engine_is_refused(bundle: Bundle) -> None:
    record, other = record_of(inputs_of(bundle)), record_of(inputs_of(bundle, rules=2))
    folder = bundle.root / "engines" / "new"
    folder.mkdir(parents=True)
    (folder / RECORD_NAME).write_bytes(other.to_json())
    bundle.add_engine(folder, EngineEntry(record.key, "tensorrt-rtx", (f"engines/{record.key}/{RECORD_NAME}",)))
    with pytest.raises(BundleError, match="the record of another engine"):
        find(bundle)


def test_a_build_that_was_killed_is_harmless(bundle: Bundle) -> None:
    """Before the rename, and between the rename and the manifest: sessions pass over it, and the next build lands."""
    record = record_of(inputs_of(bundle))
    for name in (f".{record.key[:40]}.partial-0123abcd", record.key):
        (bundle.root / "engines" / name).mkdir(parents=True)
        (bundle.root / "engines" / name / "decoder.engine").write_bytes(b"half")
    opened = Bundle.open(bundle.root)
    assert len(opened.verify(full=True).problems) == 2
    added = add(opened, record)
    assert find(added) == CONTENT["decoder"]
    assert [problem.path.split("/")[1][0] for problem in added.verify(full=True).problems] == ["."]
