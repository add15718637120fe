"""The walker that finds external data, against the protobuf library and onnx's own schema."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx
import pytest
from google.protobuf.message import DecodeError, Message
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mllama_runtime.errors import BundleError
from mllama_runtime.onnxfile import _CHILDREN, MAX_GRAPH_BYTES, ExternalTensor, external_tensors
from onnx import ModelProto, TensorProto, helper

from ._bundle import external, graph_model

PLACE = {"location": "weights.safetensors", "offset": "64", "length": "16"}
FUZZ = settings(
    max_examples=400, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def tensor(name: str) -> TensorProto:
    return external(name, PLACE)


def everywhere() -> ModelProto:
    """A model with one external tensor in each place the schema has for one."""
    model = graph_model(tensor("initializer"))
    sparse = onnx.SparseTensorProto(values=tensor("sparse values"), indices=tensor("sparse indices"))
    model.graph.sparse_initializer.append(sparse)
    inner = helper.make_graph([], "inner", [], [], [tensor("subgraph")])
    innermost = helper.make_graph([], "innermost", [], [], [tensor("subgraph of a subgraph")])
    inner.node.append(helper.make_node("If", ["c"], ["o"], then_branch=innermost))
    node = model.graph.node.add(op_type="Any")
    node.attribute.add(name="t", t=tensor("attribute"))
    node.attribute.add(name="ts", tensors=[tensor("attribute list")])
    node.attribute.add(name="g", g=inner)
    node.attribute.add(name="gs", graphs=[helper.make_graph([], "listed", [], [], [tensor("graph list")])])
    listed = onnx.SparseTensorProto(values=tensor("sparse attribute list"))
    node.attribute.add(name="s", sparse_tensor=onnx.SparseTensorProto(values=tensor("sparse attribute")))
    node.attribute.add(name="ss", sparse_tensors=[listed])
    function = model.functions.add(name="f")
    function.node.add(op_type="Constant").attribute.add(name="value", t=tensor("function"))
    function.attribute_proto.add(name="default", t=tensor("function default"))
    model.training_info.add(initialization=helper.make_graph([], "training", [], [], [tensor("training")]))
    model.training_info.add(algorithm=helper.make_graph([], "algorithm", [], [], [tensor("algorithm")]))
    return model


def tensors_of(message: Message) -> Iterator[TensorProto]:
    """Every TensorProto in a message, by the protobuf library's reflection."""
    if isinstance(message, TensorProto):
        yield message
    for field, value in message.ListFields():
        if field.message_type is not None:
            for child in value if field.is_repeated else [value]:
                yield from tensors_of(child)


def save(path: Path, model: Message) -> Path:
    path.write_bytes(model.SerializeToString())
    return path


def test_every_place_is_found(tmp_path: Path) -> None:
    model = everywhere()
    names = {found.name for found in tensors_of(model)}
    assert len(names) == 14
    found = external_tensors(save(tmp_path / "m.onnx", model))
    assert {item.name for item in found} == names
    assert set(found) == {ExternalTensor(name, "weights.safetensors", 64, 16) for name in names}


def test_the_table_is_the_whole_schema() -> None:
    """Walks onnx's descriptors: no message that can lead to a tensor is missing from the table."""

    def leads_to_tensor(kind: object, seen: frozenset[str] = frozenset()) -> bool:
        if kind.name == "TensorProto":
            return True
        below = [field.message_type for field in kind.fields if field.message_type is not None]
        return kind.name not in seen and any(leads_to_tensor(child, seen | {kind.name}) for child in below)

    short = {"TrainingInfoProto": "Training", "SparseTensorProto": "Sparse"}
    table: dict[str, dict[int, str]] = {}
    pending = [ModelProto.DESCRIPTOR]
    while pending:
        kind = pending.pop()
        name = short.get(kind.name, kind.name.removesuffix("Proto"))
        if name in table or name == "Tensor":
            continue
        children = [field for field in kind.fields if field.message_type and leads_to_tensor(field.message_type)]
        table[name] = {
            field.number: short.get(field.message_type.name, field.message_type.name.removesuffix("Proto"))
            for field in children
        }
        pending += [field.message_type for field in children]
    assert table == _CHILDREN
    numbers = TensorProto.DESCRIPTOR.fields_by_name
    assert [numbers[name].number for name in ("name", "external_data", "data_location")] == [8, 13, 14]


def test_inline_data_is_no_pointer(tmp_path: Path) -> None:
    weight = helper.make_tensor("w", TensorProto.FLOAT, [4, 4], [1.0] * 16)
    assert external_tensors(save(tmp_path / "m.onnx", graph_model(weight))) == []


def test_an_offset_may_be_absent(tmp_path: Path) -> None:
    weight = external("w", {"location": "a", "length": "4"})
    assert external_tensors(save(tmp_path / "m.onnx", graph_model(weight))) == [ExternalTensor("w", "a", 0, 4)]


POINTERS = {
    "no location": ({"offset": "0", "length": "4"}, "location, length and offset once each"),
    "no length": ({"location": "a", "offset": "0"}, "location, length and offset once each"),
    "nothing": ({}, r"found \[\]"),
    "an unknown key": ({**PLACE, "basepath": "/etc"}, "found .*'basepath'"),
    "a negative offset": ({**PLACE, "offset": "-1"}, "decimal numbers, found '-1'"),
    "a signed offset": ({**PLACE, "offset": "+1"}, "found '\\+1'"),
    "a hexadecimal length": ({**PLACE, "length": "0x10"}, "found '0x10'"),
    "an Arabic digit": ({**PLACE, "length": "\u0661"}, "decimal numbers"),
    "an empty length": ({**PLACE, "length": ""}, "decimal numbers, found ''"),
    "a length of 20 digits": ({**PLACE, "length": "1" * 20}, "decimal numbers"),
}


@pytest.mark.parametrize(("entries", "message"), POINTERS.values(), ids=POINTERS)
def test_a_malformed_pointer_is_refused(tmp_path: Path, entries: dict[str, str], message: str) -> None:
    path = save(tmp_path / "m.onnx", graph_model(external("w", entries)))
    with pytest.raises(BundleError, match=f"m.onnx: the external data of tensor 'w' is malformed: .*{message}"):
        external_tensors(path)


def test_a_key_standing_twice_is_refused(tmp_path: Path) -> None:
    weight = tensor("w")
    weight.external_data.add(key="location", value="/etc/passwd")
    with pytest.raises(BundleError, match="malformed"):
        external_tensors(save(tmp_path / "m.onnx", graph_model(weight)))


def test_a_pointer_without_the_external_mark_counts(tmp_path: Path) -> None:
    weight = tensor("w")
    weight.data_location = TensorProto.DEFAULT
    assert len(external_tensors(save(tmp_path / "m.onnx", graph_model(weight)))) == 1


MALFORMED = {
    "text": b"not a model at all",
    "a group": b"\x3b\x3c",
    "an unfinished varint": b"\x08" + b"\x80" * 10,
    "field number 0": b"\x02\x00",
    "a field number beyond 2^29": b"\xba\x80\x80\x80\x80\x80\x01\x00",
    "a length past the end": b"\x3a\x7f",
    "a length of 2^63": b"\x3a" + b"\xff" * 8 + b"\x7f",
    "a graph that is a number": b"\x38\x01",
    "a fixed64 cut short": b"\x09\x00",
}


@pytest.mark.parametrize("data", MALFORMED.values(), ids=MALFORMED)
def test_malformed_protobuf_is_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(data)
    with pytest.raises(BundleError, match=r"m.onnx: not an ONNX file"):
        external_tensors(path)


def test_sizes_out_of_range_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(b"")
    with pytest.raises(BundleError, match="found 0 bytes"):
        external_tensors(path)
    with path.open("wb") as file:
        file.truncate(MAX_GRAPH_BYTES + 1)
    with pytest.raises(BundleError, match="not a graph by its size"):
        external_tensors(path)
    with pytest.raises(BundleError, match="cannot be read"):
        external_tensors(tmp_path / "absent.onnx")


def test_nesting_as_deep_as_a_file_claims(tmp_path: Path) -> None:
    """Attribute -> graph -> node -> attribute, 3,000 times: the protobuf library gives up at 100, Python at 1,000."""

    def wrap(field: int, data: bytes) -> bytes:
        size, length = len(data), b""
        while size > 0x7F:
            length, size = length + bytes([size & 0x7F | 0x80]), size >> 7
        return bytes([field << 3 | 2]) + length + bytes([size]) + data

    data = wrap(5, tensor("w").SerializeToString())
    for _ in range(3000):
        data = wrap(1, wrap(5, wrap(6, data)))
    path = tmp_path / "m.onnx"
    path.write_bytes(wrap(7, data))
    assert [found.name for found in external_tensors(path)] == ["w"]


SEED = everywhere().SerializeToString()


@given(
    st.lists(st.tuples(st.integers(0, len(SEED) - 1), st.integers(0, 255)), min_size=1, max_size=3),
    st.integers(0, len(SEED)),
)
@FUZZ
def test_mutations_hide_nothing(tmp_path: Path, changes: list[tuple[int, int]], cut: int) -> None:
    """Whatever we accept, the protobuf library finds no pointer in it that we did not."""
    data = bytearray(SEED)
    for at, byte in changes:
        data[at] = byte
    path = tmp_path / "fuzz.onnx"
    path.write_bytes(data if cut % 4 else data[:cut])
    try:
        ours = external_tensors(path)
    except BundleError:
        return
    try:
        model = ModelProto.FromString(path.read_bytes())
    except DecodeError:
        return
    theirs = [found for found in tensors_of(model) if found.external_data or found.data_location]
    places = {(item.location, item.offset, item.length) for item in ours}
    for found in theirs:
        values = {pair.key: pair.value for pair in found.external_data}
        assert (values["location"], int(values.get("offset", 0)), int(values["length"])) in places
