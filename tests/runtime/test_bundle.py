"""Opening, verifying and stamping a bundle: each fault of each kind of file is found and named."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import mllama_runtime.bundle as bundle_module
import numpy as np
import onnxruntime
import pytest
from mllama_runtime.bundle import Bundle, Problem, Verification
from mllama_runtime.bundle_writer import BundleWriter
from mllama_runtime.errors import BundleError, InputError, UsageError
from mllama_runtime.manifest import Validation

from ._bundle import external, graph_model, list_files, make_bundle

FILES = ["LICENSE", "decoder.onnx", "tokenizer.json", "vision.onnx", "weights.safetensors"]
VERDICT = Validation("pass", "reports/validation.json", 3, 0, "model")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_bundle(tmp_path / "bundle")


@pytest.fixture(params=["quick and small", "full", "quick and large"])
def verify(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], Verification]:
    """`Bundle.verify` in its modes; "large" makes every file too large for a quick hash."""
    if request.param == "quick and large":
        monkeypatch.setattr(bundle_module, "QUICK_HASH_BYTES", -1)
    return lambda folder: Bundle.read(folder).verify(full=request.param == "full")


def only(result: Verification) -> Problem:
    assert len(result.problems) == 1, result.problems
    return result.problems[0]


def refusal(folder: Path) -> str:
    with pytest.raises(BundleError) as caught:
        Bundle.open(folder)
    return str(caught.value)


def double(path: Path) -> np.ndarray:
    """The vision graph's answer for ones: its matrix is twice the identity."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": np.ones((1, 4), np.float32)})[0]


def test_a_whole_bundle_is_right(folder: Path, verify: Callable[[Path], Verification]) -> None:
    result = verify(folder)
    assert result.problems == ()
    assert result.num_files == 5
    opened = Bundle.open(folder)
    assert opened.root == folder
    assert opened.path("tokenizer.json").read_text() == '{"version": "1.0"}\n'
    with pytest.raises(BundleError, match="passwd: the bundle has no such file"):
        opened.path("../passwd")


def test_progress_adds_up(folder: Path) -> None:
    seen: list[int] = []
    result = Bundle.open(folder).verify(full=True, progress=seen.append)
    assert sum(seen) == result.num_hashed_bytes == sum((folder / name).stat().st_size for name in FILES)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("where", ["first", "middle", "last"])
def test_one_flipped_bit_is_found(folder: Path, name: str, where: str) -> None:
    path = folder / name
    data = bytearray(path.read_bytes())
    at = {"first": 0, "middle": len(data) // 2, "last": len(data) - 1}[where]
    data[at] ^= 0x10
    path.write_bytes(data)
    assert only(Bundle.read(folder).verify(full=True)).path == name
    assert refusal(folder).startswith(f"{path}: ")


def test_a_large_file_is_hashed_in_full_mode_only(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one fault that opening does not see: other bytes of the right size within large weights."""
    monkeypatch.setattr(bundle_module, "QUICK_HASH_BYTES", 300)
    weights = folder / "weights.safetensors"
    assert weights.stat().st_size > 300
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    Bundle.open(folder)
    problem = only(Bundle.read(folder).verify(full=True))
    assert problem.what == "wrong content"
    assert problem.expected == f"sha256 {Bundle.read(folder).manifest.files['weights.safetensors'].sha256}"


@pytest.mark.parametrize("name", FILES)
def test_truncated_extended_emptied_missing(folder: Path, verify: Callable[[Path], Verification], name: str) -> None:
    path = folder / name
    data = path.read_bytes()
    for wrong in (data[:-1], data + b"\0", b""):
        path.write_bytes(wrong)
        problem = only(verify(folder))
        assert str(problem) == f"{name}: wrong size: expected {len(data)} bytes, found {len(wrong)} bytes"
        assert f"{name}: wrong size" in refusal(folder)
    path.unlink()
    assert str(only(verify(folder))) == f"{name}: missing: expected {len(data)} bytes"
    assert f"{name}: missing" in refusal(folder)


def test_swapped_files_are_found(folder: Path) -> None:
    """Two graphs of the same size, each a good graph."""
    left, right = folder / "vision.onnx", folder / "decoder.onnx"
    right.write_bytes(left.read_bytes().replace(b"vision.w", b"vision.v"))
    list_files(folder)
    left.rename(folder / "swap")
    right.rename(left)
    (folder / "swap").rename(right)
    result = Bundle.read(folder).verify(full=False)
    assert [(problem.path, problem.what) for problem in result.problems] == [
        ("decoder.onnx", "wrong content"),
        ("vision.onnx", "wrong content"),
    ]
    assert "(and 1 more problems)" in refusal(folder)


def test_unknown_files_are_found(folder: Path, verify: Callable[[Path], Verification]) -> None:
    (folder / "sub").mkdir()
    (folder / "sub/evil.so").write_bytes(b"\x7fELF")
    assert str(only(verify(folder))) == "sub/evil.so: not listed in the manifest: found a file"
    assert "sub/evil.so: not listed" in refusal(folder)


def test_leftovers_of_an_interrupted_stamp_are_named_but_harmless(folder: Path) -> None:
    (folder / "reports").mkdir()
    (folder / "reports/validation.json").write_text("{}")
    (folder / ".manifest.json.partial-0123abcd").write_text("{")
    assert len(Bundle.open(folder).verify(full=False).problems) == 2


def test_a_listed_report_is_no_leftover(folder: Path) -> None:
    Bundle.open(folder).stamp(VERDICT, {"reports/validation.json": b"{}"})
    (folder / "reports/validation.json").write_bytes(b"[]")
    assert "reports/validation.json: wrong content" in refusal(folder)


@pytest.mark.parametrize("target", ["inside", "outside", "nowhere"])
def test_a_symbolic_link_is_refused(folder: Path, verify: Callable[[Path], Verification], target: str) -> None:
    path = folder / "weights.safetensors"
    outside = folder.parent / "elsewhere"
    path.rename(outside)
    if target == "inside":
        shutil.copy(outside, folder / "w")
    path.symlink_to({"inside": "w", "outside": outside, "nowhere": "nothing"}[target])
    assert "weights.safetensors: not a plain file: found a symbolic link" in map(str, verify(folder).problems)
    if target != "inside":
        assert "cp -rL" in refusal(folder)


def test_a_linked_folder_inside_is_not_followed(folder: Path) -> None:
    (folder / "engines").mkdir()
    (folder / "engines/e").write_bytes(b"engine")
    list_files(folder)
    Bundle.open(folder)
    (folder / "engines").rename(folder.parent / "engines")
    (folder / "engines").symlink_to(folder.parent / "engines")
    problems = list(map(str, Bundle.read(folder).verify(full=True).problems))
    assert problems == [
        "engines: not listed in the manifest: found a symbolic link",
        "engines/e: missing: expected 6 bytes",
    ]


def test_special_files_are_refused_without_being_opened(folder: Path) -> None:
    (folder / "LICENSE").unlink()
    os.mkfifo(folder / "LICENSE")
    assert str(only(Bundle.read(folder).verify(full=True))) == "LICENSE: not a plain file: found a special file"
    (folder / "manifest.json").unlink()
    os.mkfifo(folder / "manifest.json")
    assert "the manifest is not a plain file" in refusal(folder)


def test_a_link_instead_of_the_manifest_is_refused(folder: Path) -> None:
    (folder / "manifest.json").rename(folder.parent / "m.json")
    (folder / "manifest.json").symlink_to(folder.parent / "m.json")
    assert "the manifest is not a plain file" in refusal(folder)


def test_no_bundle_at_all(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    assert "empty/manifest.json: not a bundle: it has no manifest; name a folder" in refusal(tmp_path / "empty")
    assert refusal(tmp_path / "absent").endswith("absent: no such folder")
    assert "cannot be read (Not a directory)" in refusal(tmp_path / "file")
    assert "manifest.json: the manifest is empty" in refusal(make_empty_manifest(tmp_path))
    (tmp_path / "loop").symlink_to("loop")
    for path in (tmp_path / "loop", Path("null\0character")):
        with pytest.raises(BundleError):
            Bundle.read(path)


def test_a_working_folder_that_was_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(BundleError, match=r"^bundle: cannot be found \("):
        Bundle.read(Path("bundle"))
    with pytest.raises(InputError, match=r"^bundle: cannot be found \("):
        BundleWriter(Path("bundle"))


def make_empty_manifest(tmp_path: Path) -> Path:
    folder = make_bundle(tmp_path / "bundle")
    (folder / "manifest.json").write_bytes(b"")
    return folder


@pytest.fixture
def read_only(folder: Path) -> Iterator[Path]:
    """The bundle on a read-only mount, or in a folder without write permission where mounting is not allowed."""
    point = folder.parent / "mount"
    point.mkdir()
    bound = subprocess.run(["mount", "--bind", folder, point], capture_output=True)
    if bound.returncode == 0:
        subprocess.run(["mount", "-o", "remount,ro,bind", point], check=True)
        yield point
        subprocess.run(["umount", point], check=True)
    elif os.geteuid() == 0:
        pytest.skip("root without the right to mount")
    else:
        folder.chmod(0o555)
        yield folder
        folder.chmod(0o755)


def test_on_a_read_only_mount(read_only: Path) -> None:
    opened = Bundle.open(read_only)
    assert opened.verify(full=True).problems == ()
    assert double(opened.path("vision.onnx")).tolist() == [[2.0] * 4]
    with pytest.raises(InputError, match=r"cannot be written \((Read-only file system|Permission denied)\)"):
        opened.stamp(VERDICT, {"reports/validation.json": b"{}"})


@pytest.mark.parametrize("way", ["copied", "renamed", "behind a linked folder", "snapshot of hard links"])
def test_moved_bundles_work(folder: Path, way: str) -> None:
    other = folder.parent / "another name, größer"
    if way == "copied":
        shutil.copytree(folder, other)
        shutil.rmtree(folder)
    elif way == "renamed":
        folder.rename(other)
    elif way == "behind a linked folder":
        other.symlink_to(folder)
    else:
        shutil.copytree(folder, other, copy_function=os.link)
    opened = Bundle.open(other)
    assert opened.verify(full=True).problems == ()
    assert double(opened.path("vision.onnx")).tolist() == [[2.0] * 4]


PLACES = {
    "another folder": ({"location": "../weights.safetensors"}, "expected a weights file listed in the manifest"),
    "an absolute path": ({"location": "/etc/passwd"}, "found '/etc/passwd'"),
    "a detour": ({"location": "./weights.safetensors"}, "expected a weights file"),
    "a file not listed": ({"location": "other.safetensors"}, "found 'other.safetensors'"),
    "a file that holds no weights": ({"location": "tokenizer.json"}, "found 'tokenizer.json'"),
    "the manifest": ({"location": "manifest.json"}, "found 'manifest.json'"),
    "nothing": ({"location": ""}, "found ''"),
    "a negative offset": ({"offset": "-64"}, "decimal numbers, found '-64'"),
    "a negative length": ({"length": "-1"}, "decimal numbers, found '-1'"),
    "a huge offset": ({"offset": f"{2**62}"}, f"found byte {2**62 + 64}"),
    "an endless offset": ({"offset": "9" * 30}, "decimal numbers"),
    "one byte too far": ({"offset": "LAST"}, "expected at most SIZE bytes of weights.safetensors, found byte"),
}


@pytest.mark.parametrize("hashed", [True, False], ids=["listed so", "changed later"])
@pytest.mark.parametrize(("change", "message"), PLACES.values(), ids=PLACES)
def test_external_data_outside_the_weights_is_refused(
    folder: Path, change: dict[str, str], message: str, hashed: bool
) -> None:
    """Whether or not the manifest vouches for the graph: a bundle may come from a stranger."""
    size = (folder / "weights.safetensors").stat().st_size
    last = {"LAST": f"{size - 63}"}
    place = {"location": "weights.safetensors", "offset": "0", "length": "64"} | change
    place = {key: last.get(value, value) for key, value in place.items()}
    path = folder / "vision.onnx"
    path.write_bytes(graph_model(external("vision.w", place)).SerializeToString())
    manifest = list_files(folder)
    if not hashed:
        entry = replace(manifest.files["vision.onnx"], sha256="0" * 64)
        files = {**manifest.files, "vision.onnx": entry}
        (folder / "manifest.json").write_bytes(replace(manifest, files=files).to_json())
    line = refusal(folder)
    assert "vision.onnx: the external data of tensor 'vision.w' is" in line
    assert message.replace("SIZE", f"{size}") in line


def test_a_weights_file_that_is_none_is_refused(folder: Path, verify: Callable[[Path], Verification]) -> None:
    path = folder / "weights.safetensors"
    path.write_bytes(bytes(path.stat().st_size))
    list_files(folder)
    problem = only(verify(folder))
    assert problem.path == "weights.safetensors"
    assert "header's length is out of range" in problem.what


def test_an_interrupt_ends_the_hashing_at_once(folder: Path) -> None:
    """Ctrl-C raises in the main thread; a sparse file of 64 GiB would take a minute to hash."""
    with (folder / "huge").open("wb") as file:
        file.truncate(64 * 2**30)
    manifest = Bundle.read(folder).manifest
    entry = replace(manifest.files["LICENSE"], size_bytes=64 * 2**30)
    (folder / "manifest.json").write_bytes(replace(manifest, files={**manifest.files, "huge": entry}).to_json())
    num_calls = 0

    def interrupt(num_bytes: int) -> None:
        nonlocal num_calls
        num_calls += 1
        if num_calls == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Bundle.read(folder).verify(full=True, progress=interrupt)
    assert num_calls == 20


def test_a_stamp_adds_report_and_verdict(folder: Path) -> None:
    stamped = Bundle.open(folder).stamp(VERDICT, {"reports/validation.json": b"{}", "reports/validation.html": b"<p>"})
    again = Bundle.open(folder)
    assert again == stamped
    assert again.manifest.validation == VERDICT
    assert again.path("reports/validation.html").read_bytes() == b"<p>"
    assert again.verify(full=True).problems == ()
    failed = replace(VERDICT, verdict="fail", num_failed=1)
    assert again.stamp(failed, {"reports/validation.json": b"[]"}).verify(full=True).problems == ()
    assert Bundle.open(folder).manifest.validation == failed


@pytest.mark.parametrize("name", ["decoder.onnx", "reports/../decoder.onnx", "/reports/x", "reports"])
def test_a_stamp_writes_below_reports_only(folder: Path, name: str) -> None:
    with pytest.raises(UsageError, match="a report belongs below reports/"):
        Bundle.open(folder).stamp(VERDICT, {name: b""})
    with pytest.raises(BundleError, match=r"validation.report: not one of the bundle's files"):
        Bundle.open(folder).stamp(VERDICT, {})
    assert Bundle.open(folder).manifest.validation is None


def test_a_verdict_is_not_put_on_another_bundle(folder: Path) -> None:
    """Validation takes long; the folder may hold a new export by its end."""
    opened = Bundle.open(folder)
    files = dict(opened.manifest.files)
    files["decoder.onnx"] = replace(files["decoder.onnx"], sha256="0" * 64)
    (folder / "manifest.json").write_bytes(replace(opened.manifest, files=files).to_json())
    with pytest.raises(BundleError, match=r"decoder\.onnx: the bundle has become another one meanwhile"):
        opened.stamp(VERDICT, {"reports/validation.json": b"{}"})
    assert not (folder / "reports").exists()


@pytest.mark.parametrize("step", range(8))
def test_a_stamp_interrupted_anywhere_leaves_a_good_bundle(
    folder: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """A power cut before the n-th file of a second stamp (a test double stands for the write that never happens)."""
    Bundle.open(folder).stamp(VERDICT, {"reports/validation.json": b"{}", "reports/validation.html": b"<p>"})
    write, num_writes = bundle_module.write_whole, 0

    def cut(path: Path, data: bytes) -> None:
        nonlocal num_writes
        if num_writes == step:
            raise KeyboardInterrupt
        num_writes += 1
        write(path, data)

    monkeypatch.setattr(bundle_module, "write_whole", cut)
    new = {"reports/validation.json": b"[]", "reports/validation.html": b"<b>"}
    failed = replace(VERDICT, verdict="fail", num_failed=1)
    if step < 4:  # the bare manifest, two reports, the stamped manifest
        with pytest.raises(KeyboardInterrupt):
            Bundle.open(folder).stamp(failed, new)
        assert Bundle.open(folder).manifest.validation == (VERDICT if step == 0 else None)
    else:
        Bundle.open(folder).stamp(failed, new)
        assert Bundle.open(folder).manifest.validation == failed
    monkeypatch.undo()
    assert Bundle.open(folder).stamp(failed, new).verify(full=True).problems == ()
