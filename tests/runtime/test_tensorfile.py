"""The strict safetensors reader, against the reference library where both have an opinion."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.numpy
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mllama_runtime.errors import BundleError, CheckpointError, InputError, UsageError
from mllama_runtime.tensorfile import DTYPE_BYTES, TensorFile, encode_header, read_header

FUZZ = settings(
    max_examples=300, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def write(path: Path, header: object, data: bytes = b"", *, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(dtype: object = "F32", shape: object = (1,), offsets: object = (0, 4), **more: object) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


def test_reads_what_the_library_writes(tmp_path: Path) -> None:
    tensors = {
        "a.weight": torch.arange(6, dtype=torch.float32).reshape(2, 3),
        "b": torch.ones(5, dtype=torch.bfloat16),
        "scalar": torch.tensor(7, dtype=torch.int64),
        "empty": torch.empty(0, 4),
        "mask": torch.tensor([True, False]),
    }
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt", "note": "two\nlines"})

    found = read_header(path, error=CheckpointError)

    assert found.metadata == {"format": "pt", "note": "two\nlines"}
    assert found.size_bytes == path.stat().st_size
    assert found.tensors.keys() == tensors.keys()
    data = path.read_bytes()
    for name, tensor in tensors.items():
        info = found.tensors[name]
        assert info.shape == tuple(tensor.shape)
        stored = data[info.offset_bytes : info.offset_bytes + info.size_bytes]
        assert stored == tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def test_the_library_reads_what_we_lay_out(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = {
        "gate": rng.random(1, dtype="f4"),
        "w": rng.random((16, 16), dtype="f4"),
        "half": rng.random((3, 5)).astype("f2"),
        "flags": np.array([True, False, True]),
        "none": np.empty((0, 3), "f4"),
        "double": rng.random(3),
        "ümlaut": rng.random((8, 8), dtype="f4"),
    }
    names = {"f4": "F32", "f2": "F16", "b1": "BOOL", "f8": "F64"}
    header, infos = encode_header(
        ((name, names[array.dtype.str[1:]], array.shape) for name, array in arrays.items()), {"made": "by hand"}
    )
    path = tmp_path / "w.safetensors"
    path.write_bytes(header + b"".join(arrays[info.name].tobytes() for info in infos))

    loaded = safetensors.numpy.load_file(path)
    assert loaded.keys() == arrays.keys()
    assert all(np.array_equal(loaded[name], array) for name, array in arrays.items())
    assert read_header(path, error=BundleError).tensors == {info.name: info for info in infos}
    assert len(header) % 64 == 0
    for info in infos:
        assert info.offset_bytes % DTYPE_BYTES[info.dtype] == 0
    assert all(info.offset_bytes % 64 == 0 for info in infos if info.name in ("w", "ümlaut"))


@given(st.lists(st.tuples(st.sampled_from(sorted(DTYPE_BYTES)), st.lists(st.integers(0, 9), max_size=3)), max_size=12))
@FUZZ
def test_any_layout_is_aligned_and_readable(tmp_path: Path, specs: list[tuple[str, list[int]]]) -> None:
    header, infos = encode_header((f"t{index}", dtype, tuple(shape)) for index, (dtype, shape) in enumerate(specs))
    path = tmp_path / "any.safetensors"
    path.write_bytes(header + bytes(sum(info.size_bytes for info in infos)))
    assert len(read_header(path, error=BundleError).tensors) == len(specs)
    for info in infos:
        assert info.offset_bytes % min(64, info.size_bytes & -info.size_bytes or 64) == 0


def test_a_layout_refuses_what_it_cannot_write() -> None:
    with pytest.raises(UsageError, match=r"w: .*twice"):
        encode_header([("w", "F32", (1,)), ("w", "F32", (1,))])
    with pytest.raises(UsageError, match="F4"):
        encode_header([("w", "F4", (2,))])


def test_only_the_header_is_read(tmp_path: Path) -> None:
    """A sparse file of 64 GiB, far beyond the memory of any test machine."""
    size = 64 * 2**30
    path = write(tmp_path / "huge.safetensors", {"w": entry("U8", [size], [0, size])})
    start = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(start + size)
    assert read_header(path, error=BundleError).tensors["w"].size_bytes == size


LENGTHS = {
    "empty": (b"", "expected at least 8 bytes, found 0 bytes"),
    "seven bytes": (b"\0" * 7, "expected at least 8 bytes, found 7 bytes"),
    "length 0": (bytes(8), "length is out of range: expected 1 to 100000000 bytes, found 0 bytes"),
    "length 2^63": ((2**63).to_bytes(8, "little") + b"{}", "found 9223372036854775808 bytes"),
    "length over the limit": ((100_000_001).to_bytes(8, "little") + b"{}", "found 100000001 bytes"),
    "length past the end": ((100).to_bytes(8, "little") + b"{}", "expected at least 108 bytes .* found 10 bytes"),
}


@pytest.mark.parametrize(("data", "message"), LENGTHS.values(), ids=LENGTHS)
def test_a_wrong_length_is_refused(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "shard-1.safetensors"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=f"shard-1.safetensors: .*{message}"):
        read_header(path, error=CheckpointError)


HEADERS: dict[str, tuple[object, str]] = {
    "not JSON": (b"{nope}", "not JSON"),
    "not UTF-8": (b'{"\xff": 1}', "not JSON"),
    "not an object": (b"[]", "expected '{' first, found b'\\['"),
    "a space first": (b' {"w": 1}', "expected '{' first"),
    "cut short": (b'{"w": ', "not JSON"),
    "nested deeply": (b'{"w":' * 100_000, "not JSON|nested too deeply"),
    "a key twice": (b'{"w": {}, "w": {}}', "twice in one object: found 'w'"),
    "NaN": (b'{"w": NaN}', "found NaN"),
    "a huge number": (b'{"w": ' + b"9" * 5000 + b"}", "not JSON"),
    "not a tensor": ({"w": 3}, "tensor 'w': wrong type: expected an object, found 3"),
    "no dtype": ({"w": {"shape": [1], "data_offsets": [0, 4]}}, "tensor 'w'.dtype: the field is missing"),
    "an unknown field": ({"w": entry(more=1)}, "tensor 'w'.more: the field is unknown"),
    "an unknown dtype": ({"w": entry("F33")}, "tensor 'w' has an unsupported dtype: found 'F33'"),
    "a sub-byte dtype": ({"w": entry("F4", [8])}, "unsupported dtype: found 'F4'"),
    "dtype of another type": ({"w": entry(["F32"])}, "tensor 'w'.dtype: wrong type: expected a string, found a list"),
    "a negative dimension": ({"w": entry(shape=[-1])}, "tensor 'w' has an impossible shape"),
    "a fractional dimension": ({"w": entry(shape=[1.0])}, r"tensor 'w'.shape\[0\]: wrong type: expected an integer"),
    "a boolean dimension": ({"w": entry(shape=[True])}, r"tensor 'w'.shape\[0\]: wrong type"),
    "a dimension of 2^63": ({"w": entry(shape=[2**63])}, "impossible shape"),
    "a shape that overflows to 4 bytes": (
        {"w": entry(shape=[2**62, 2**62 + 1, 4])},
        "tensor 'w' has offsets that do not fit its shape: expected .* bytes for F32 .* found 4",
    ),
    "too many dimensions": ({"w": entry(shape=[1] * 33)}, "impossible shape"),
    "reversed offsets": ({"w": entry(offsets=[4, 0])}, "tensor 'w' has impossible offsets: found \\[4, 0\\]"),
    "a negative offset": ({"w": entry(offsets=[-4, 0])}, "impossible offsets"),
    "three offsets": ({"w": entry(offsets=[0, 4, 8])}, "expected 2 entries, found 3"),
    "too few bytes": ({"w": entry(offsets=[0, 3])}, r"expected 4 bytes for F32 \[1\], found 3"),
    "overlap": ({"w": entry(), "v": entry()}, "tensor 'v' overlaps the one before it: expected data at byte .* found"),
    "a hole": ({"w": entry(), "v": entry(offsets=[8, 12])}, "tensor 'v' leaves a hole before it"),
    "a hole at the start": ({"w": entry(offsets=[4, 8])}, "tensor 'w' leaves a hole before it"),
    "metadata of another type": ({"__metadata__": {"a": 1}}, "__metadata__ does not map strings to strings"),
}


@pytest.mark.parametrize(("header", "message"), HEADERS.values(), ids=HEADERS)
def test_a_wrong_header_is_refused(tmp_path: Path, header: object, message: str) -> None:
    path = write(tmp_path / "shard-1.safetensors", header, bytes(12))
    with pytest.raises(CheckpointError, match=message) as caught:
        read_header(path, error=CheckpointError)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("cut", [1, 4, 5, 8])
def test_truncation_names_the_tensor_and_both_sizes(tmp_path: Path, cut: int) -> None:
    path = write(tmp_path / "shard.safetensors", {"w": entry(), "v": entry(offsets=[4, 8])}, bytes(8 - cut))
    size = path.stat().st_size
    tensor = "v" if cut <= 4 else "w"
    message = f"truncated within tensor '{tensor}': expected {size + cut} bytes, found {size} bytes"
    with pytest.raises(BundleError, match=message):
        read_header(path, error=BundleError)


def test_bytes_behind_the_last_tensor_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "w.safetensors", {"w": entry()}, bytes(5))
    with pytest.raises(BundleError, match=r"bytes behind the last tensor: expected .* bytes, found .* bytes"):
        read_header(path, error=BundleError)


def test_what_cannot_be_opened_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"absent.safetensors: cannot be read \(No such file"):
        read_header(tmp_path / "absent.safetensors", error=CheckpointError)
    with pytest.raises(CheckpointError, match=r"cannot be read \(Is a directory"):
        read_header(tmp_path, error=CheckpointError)


def accepted_by_both(path: Path) -> TensorFile | None:
    """The header if we take it; then the library must take it too, and see the same."""
    try:
        ours = read_header(path, error=BundleError)
    except InputError:
        return None
    theirs = safetensors.deserialize(path.read_bytes())
    assert {name: tuple(info["shape"]) for name, info in theirs} == {
        name: info.shape for name, info in ours.tensors.items()
    }
    return ours


SEED_HEADER, SEED_INFOS = encode_header([("w", "F32", (2, 3)), ("v", "I64", (2,)), ("s", "BOOL", ())], {"a": "b"})
SEED = SEED_HEADER + bytes(sum(info.size_bytes for info in SEED_INFOS))


@given(st.lists(st.tuples(st.integers(0, len(SEED_HEADER) - 1), st.integers(0, 255)), min_size=1, max_size=4))
@FUZZ
def test_mutated_bytes_never_surprise(tmp_path: Path, changes: list[tuple[int, int]]) -> None:
    data = bytearray(SEED)
    for at, byte in changes:
        data[at] = byte
    path = tmp_path / "fuzz.safetensors"
    path.write_bytes(data)
    accepted_by_both(path)


NUMBERS = st.sampled_from([-1, 0, 1, 2, 3, 4, 8, 2**31, 2**63 - 1, 2**63, 2**64, 1.0, True, None, "4"])


@given(
    st.dictionaries(
        st.sampled_from(["a", "b", "__metadata__"]),
        st.fixed_dictionaries(
            {
                "dtype": st.sampled_from(["F32", "U8", "BF16", "F4", "f32", 4]),
                "shape": st.lists(NUMBERS, max_size=3),
                "data_offsets": st.lists(NUMBERS, min_size=2, max_size=2),
            }
        ),
        max_size=3,
    ),
    st.integers(0, 16),
)
@FUZZ
def test_generated_headers_never_surprise(tmp_path: Path, header: dict[str, object], size: int) -> None:
    accepted_by_both(write(tmp_path / "fuzz.safetensors", header, bytes(size)))


def test_the_fuzzed_seed_is_itself_accepted(tmp_path: Path) -> None:
    path = tmp_path / "seed.safetensors"
    path.write_bytes(SEED)
    assert accepted_by_both(path) is not None


def test_the_library_lets_through_what_we_refuse(tmp_path: Path) -> None:
    """Why there is a reader of our own; should the library become as strict, this fails and the docstring changes."""
    headers = (
        b'{"w":{"dtype":"U8","shape":[1],"data_offsets":[0,1],"more":1}}',
        b' {"w":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
        b'{"w":{"dtype":"F32","shape":[9],"data_offsets":[0,36]},"w":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
    )
    for header in headers:
        path = write(tmp_path / "lax.safetensors", header, b"\0")
        assert safetensors.deserialize(path.read_bytes())
        with pytest.raises(BundleError):
            read_header(path, error=BundleError)
