"""Making a bundle: whole or not there, whatever happens in between."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import mllama_runtime.bundle_writer as writer_module
import mllama_runtime.disk as disk_module
import pytest
from mllama_runtime.bundle import Bundle
from mllama_runtime.bundle_writer import BundleWriter
from mllama_runtime.disk import file_sha256
from mllama_runtime.errors import BundleError, InputError, ResourceError, UsageError

from ._bundle import MANIFEST, fill

FILES = ["LICENSE", "decoder.onnx", "tokenizer.json", "vision.onnx", "weights.safetensors"]


def write(
    output: Path, *, not_inside: Path | None = None, spoil: Callable[[Path], object] = lambda folder: None
) -> Bundle:
    """A whole export; `spoil` is called with the folder right before the commit."""
    with BundleWriter(output, not_inside=not_inside) as writer:
        fill(writer.path)
        for name in FILES:
            writer.add_file(name)
        spoil(writer.path)
        return writer.commit(MANIFEST)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_committed_bundle_is_right(tmp_path: Path) -> None:
    output = tmp_path / "a bundle, größer"
    bundle = write(output)
    assert bundle == Bundle.open(output)
    assert bundle.verify(full=True).problems == ()
    assert [path.name for path in tmp_path.iterdir()] == [output.name]
    umask = os.umask(0)
    os.umask(umask)
    assert output.stat().st_mode & 0o777 == 0o777 & ~umask  # other users may read it, as far as the umask lets them
    assert all((output / name).stat().st_nlink == 1 for name in FILES)


def test_two_exports_give_the_same_bytes(tmp_path: Path) -> None:
    write(tmp_path / "a")
    write(tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_an_empty_folder_is_a_fine_output(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    assert write(tmp_path / "b").verify(full=True).problems == ()


def test_a_linked_output_is_made_where_the_link_points(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write(tmp_path / "link")
    assert Bundle.open(tmp_path / "link").root == tmp_path / "real"


def test_files_in_folders(tmp_path: Path) -> None:
    with BundleWriter(tmp_path / "b") as writer:
        fill(writer.path)
        (writer.path / "engines").mkdir()
        (writer.path / "engines/e").write_bytes(b"e")
        for name in [*FILES, "engines/e"]:
            writer.add_file(name)
        writer.commit(MANIFEST)
    assert Bundle.open(tmp_path / "b").path("engines/e").read_bytes() == b"e"


def test_a_hash_computed_while_writing_is_taken(tmp_path: Path) -> None:
    with BundleWriter(tmp_path / "b") as writer:
        fill(writer.path)
        digest = file_sha256(writer.path / "LICENSE")
        assert writer.add_file("LICENSE", sha256=digest) == writer.add_file("LICENSE")
        with pytest.raises(UsageError, match=r"\.\./x: not a path inside the bundle"):
            writer.add_file("../x")


@pytest.mark.parametrize("fault", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_exception_leaves_nothing(tmp_path: Path, fault: type[BaseException]) -> None:
    def interrupted() -> None:
        with BundleWriter(tmp_path / "b") as writer:
            fill(writer.path)
            raise fault

    with pytest.raises(fault):
        interrupted()
    assert list(tmp_path.iterdir()) == []
    write(tmp_path / "b")


def test_leaving_without_a_commit_leaves_nothing(tmp_path: Path) -> None:
    with BundleWriter(tmp_path / "b") as writer:
        fill(writer.path)
    assert list(tmp_path.iterdir()) == []


def without_adding(folder: Path) -> None:
    (folder / "extra").touch()


def changed(folder: Path) -> None:
    (folder / "LICENSE").write_text("Another licence.")


@pytest.mark.parametrize("spoil", [without_adding, changed])
def test_a_bundle_that_would_not_open_is_not_made(tmp_path: Path, spoil: Callable[[Path], None]) -> None:
    with pytest.raises(BundleError, match=r"LICENSE: wrong size|extra: not listed"):
        write(tmp_path / "b", spoil=spoil)
    assert list(tmp_path.iterdir()) == []


def test_outputs_that_are_refused(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    (checkpoint / "config.json").touch()
    (tmp_path / "link").symlink_to(checkpoint)
    (tmp_path / "file").touch()
    before = contents(tmp_path)
    for output, message in {
        checkpoint: "the checkpoint's own folder, or inside it",
        checkpoint / "bundle": "or inside it",
        checkpoint / "deep" / "bundle": "or inside it",
        tmp_path / "link" / "bundle": "or inside it",
        tmp_path / "other" / ".." / "checkpoint" / "bundle": "or inside it",
        tmp_path: "the output folder is not empty; name a new folder",
        tmp_path / "file": "the output is a file",
        tmp_path / "file" / "bundle": "Not a directory|no such folder",
        tmp_path / "absent" / "bundle": "absent: no such folder to put the bundle in",
        tmp_path / ("n" * 300): "File name too long",
        Path("/proc"): "mount point",
    }.items():
        with pytest.raises(InputError, match=message):
            write(output, not_inside=checkpoint)
    assert contents(tmp_path) == before


def test_a_checkpoint_named_through_a_link_is_still_the_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "checkpoint")
    with pytest.raises(InputError, match="or inside it"):
        write(tmp_path / "checkpoint" / "bundle", not_inside=tmp_path / "link")


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    """/proc takes no new folders, not even from root."""
    with pytest.raises(InputError, match=r"/proc/.*: cannot be written \("):
        write(Path("/proc/bundle"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    point = tmp_path / "small"
    point.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", point], capture_output=True)
    if mounted.returncode:
        pytest.skip("needs the right to mount")
    yield point
    subprocess.run(["umount", point], check=True)


def test_a_full_disk(small_disk: Path) -> None:
    message = r"b: the disk is full \(No space left on device\); free some space"
    with pytest.raises(ResourceError, match=message) as caught, BundleWriter(small_disk / "b") as writer:
        (writer.path / "weights.safetensors").write_bytes(bytes(100_000))
    assert caught.value.exit_code == 5
    assert list(small_disk.iterdir()) == []


def test_a_disk_full_at_the_manifest(small_disk: Path) -> None:
    def fill_up(folder: Path) -> None:
        with (small_disk / "filler").open("wb", buffering=0) as filler:
            while filler.write(bytes(4096)) == 4096:
                pass

    with pytest.raises(ResourceError, match="the disk is full"):
        write(small_disk / "b", spoil=fill_up)
    assert [path.name for path in small_disk.iterdir()] == ["filler"]
    (small_disk / "filler").unlink()
    assert write(small_disk / "b").verify(full=True).problems == ()


def test_a_disk_full_of_copies_names_the_bundle(small_disk: Path, tmp_path: Path) -> None:
    """shutil names what it read."""
    (tmp_path / "source.bin").write_bytes(bytes(100_000))
    with (
        pytest.raises(ResourceError, match=r"b: the disk is full \(No space left"),
        BundleWriter(small_disk / "b") as writer,
    ):
        shutil.copyfile(tmp_path / "source.bin", writer.path / "copy.bin")
    assert list(small_disk.iterdir()) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("function", ["sync", "write_whole"])
def test_a_disk_full_within_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, code: int) -> None:
    """Test double: the writer's flush or its manifest fails, as delayed allocation and quotas can make it."""

    def full(*arguments: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(writer_module, function, full)
    with pytest.raises(ResourceError, match="the disk is full"):
        write(tmp_path / "b")
    assert list(tmp_path.iterdir()) == []


def test_faults_of_other_files_keep_their_name(tmp_path: Path) -> None:
    """Something read within the block, such as a checkpoint, is not the writer's to explain."""
    with pytest.raises(FileNotFoundError), BundleWriter(tmp_path / "b"):
        (tmp_path / "absent").read_bytes()
    with (
        pytest.raises(InputError, match=r"b: cannot be written \(No such file"),
        BundleWriter(tmp_path / "b") as writer,
    ):
        (writer.path / "absent/file").write_bytes(b"")


def test_a_file_replaced_by_half_is_never_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Test double: the flush fails after the bytes were written beside the file."""
    path = tmp_path / "manifest.json"
    disk_module.write_whole(path, b"old")

    def fail(path: Path) -> None:
        raise OSError(errno.EIO, "I/O error")

    monkeypatch.setattr(disk_module, "sync", fail)
    with pytest.raises(OSError, match="I/O error"):
        disk_module.write_whole(path, b"new")
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["manifest.json"]


SCRIPT = """
import sys
from pathlib import Path
from mllama_runtime.bundle_writer import BundleWriter
from mllama_runtime.errors import MllamaError
from mllama_runtime.manifest import Manifest

source, output, mark = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
manifest = Manifest.from_json((source / "manifest.json").read_bytes(), "manifest")
try:
    with BundleWriter(output) as writer:
        for name in manifest.files:
            data = (source / name).read_bytes()
            (writer.path / name).write_bytes(mark.encode() if name == "LICENSE" else data)
            writer.add_file(name)
        print("ready", flush=True)
        sys.stdin.readline()
        writer.commit(manifest)
    print("made")
except MllamaError as error:
    print(error.exit_code, error)
"""


def start(source: Path, output: Path, mark: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, source, output, mark], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def test_two_at_once_and_one_wins(tmp_path: Path) -> None:
    write(tmp_path / "source")
    for round_number in range(3):
        output = tmp_path / f"b{round_number}"
        both = [start(tmp_path / "source", output, mark) for mark in "12"]
        for process in both:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
        answers = [process.communicate(timeout=60)[0].strip() for process in both]
        winner = answers.index("made")
        loser = answers[1 - winner]
        assert loser.startswith(f"3 {output}: another export has made this bundle meanwhile")
        assert Bundle.open(output).path("LICENSE").read_text() == "12"[winner]
        assert Bundle.open(output).verify(full=True).problems == ()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b0", "b1", "b2", "source"]


def test_a_killed_export_leaves_no_bundle_and_the_next_one_works(tmp_path: Path) -> None:
    write(tmp_path / "source")
    process = start(tmp_path / "source", tmp_path / "b", "1")
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert not (tmp_path / "b").exists()
    assert write(tmp_path / "b").verify(full=True).problems == ()
    assert contents(tmp_path / "b") == contents(tmp_path / "source")
