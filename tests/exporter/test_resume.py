"""Builds that are cut short, moved weights, and weights in several files."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from mllama_exporter import export as export_module
from mllama_exporter import placement
from mllama_exporter.export import ExportOptions, bundle_from_checkpoint
from mllama_exporter.quantize import QuantizeOptions, quantized_bundle_from_bundle
from mllama_runtime import CheckpointError, Engine, InputError, ResourceError, SamplingParams, UsageError
from mllama_runtime.bundle import Bundle
from mllama_runtime.disk import file_sha256

MOVE = ExportOptions(precision="bf16", weights="move")


@pytest.fixture
def checkpoint(miniature: Path, tmp_path: Path) -> Path:
    return shutil.copytree(miniature, tmp_path / "checkpoint")


@pytest.fixture
def many_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "_MAX_FILE_BYTES", 2_000_000)


def hashes(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): file_sha256(path) for path in folder.rglob("*") if path.is_file()}


def shards(folder: Path) -> dict[str, int]:
    """Inodes by name."""
    return {path.name: path.stat().st_ino for path in sorted(folder.glob("*.safetensors"))}


def answer(bundle: Path) -> tuple[int, ...]:
    with Engine.load(bundle, num_threads=1) as engine:
        return engine.generate("Hello", sampling=SamplingParams(max_new_tokens=12)).token_ids


# Several files


@pytest.mark.usefixtures("many_files")
def test_large_weights_are_several_files(miniature: Path, bundle_of: Callable[..., Path], tmp_path: Path) -> None:
    bundle = bundle_from_checkpoint(miniature, tmp_path / "bundle", ExportOptions(precision="bf16"))
    names = sorted(name for name in bundle.manifest.files if name.endswith(".safetensors"))
    assert len(names) > 3
    assert names == [f"weights-{index:05}-of-{len(names):05}.safetensors" for index in range(1, len(names) + 1)]
    assert all(bundle.manifest.files[name].size_bytes <= 2_000_000 for name in names)
    assert bundle.verify(full=True).problems == ()
    assert answer(bundle.root) == answer(bundle_of("bf16"))
    one = Bundle.open(bundle_of("bf16"))
    assert bundle.manifest.weights == one.manifest.weights

    options = QuantizeOptions("int8-weight")
    made = [
        quantized_bundle_from_bundle(each, tmp_path / f"int8-{index}", options, None)
        for index, each in enumerate((bundle, one))
    ]
    assert hashes(made[0].root) == hashes(made[1].root)


def test_every_file_of_the_weights_is_checked_before_it_is_quantised(
    checkpoint: Path, many_files: None, tmp_path: Path
) -> None:
    bundle = bundle_from_checkpoint(checkpoint, tmp_path / "bundle", ExportOptions(precision="bf16"))
    last = sorted(bundle.root.glob("weights-*.safetensors"))[-1]
    data = bytearray(last.read_bytes())
    data[-1] ^= 1
    last.write_bytes(data)
    with pytest.raises(InputError, match=rf"{last.name}: the weights are not what the manifest says"):
        quantized_bundle_from_bundle(bundle, tmp_path / "int8", QuantizeOptions("int8-weight"), None)


# Moved weights


def test_moved_weights_are_the_checkpoints_own_files(
    checkpoint: Path, bundle_of: Callable[..., Path], tmp_path: Path
) -> None:
    before = shards(checkpoint)
    assert len(before) == 2
    bundle = bundle_from_checkpoint(checkpoint, tmp_path / "bundle", MOVE)
    assert list(shards(bundle.root).values()) == list(before.values())  # nothing was written
    assert shards(checkpoint) == {}
    assert not (checkpoint / "model.safetensors.index.json").exists()
    assert (checkpoint / "config.json").exists()
    assert bundle.verify(full=True).problems == ()
    assert all(path.stat().st_nlink == 1 for path in bundle.root.glob("*.safetensors"))
    copied = Bundle.open(bundle_of("bf16"))
    assert bundle.manifest.weights == copied.manifest.weights
    assert answer(bundle.root) == answer(copied.root)
    made = quantized_bundle_from_bundle(bundle, tmp_path / "int8", QuantizeOptions("int8-weight"), None)
    expected = quantized_bundle_from_bundle(copied, tmp_path / "expected", QuantizeOptions("int8-weight"), None)
    assert answer(made.root) == answer(expected.root)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ExportOptions(precision="fp16", weights="move"),
            "would be cast, and cannot be moved: expected F16, found BF16",
        ),
        (ExportOptions(precision="bf16", weights="move", text_only=True), "of no use to this bundle"),
        (ExportOptions(precision="bf16", weights="move", num_layers=3), "of no use to this bundle"),
    ],
)
def test_what_cannot_be_moved_stays(options: ExportOptions, message: str, checkpoint: Path, tmp_path: Path) -> None:
    before = hashes(checkpoint)
    with pytest.raises(UsageError, match=message):
        bundle_from_checkpoint(checkpoint, tmp_path / "bundle", options)
    assert hashes(checkpoint) == before
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_damage_is_found_before_anything_is_moved(checkpoint: Path, tmp_path: Path) -> None:
    shard = sorted(checkpoint.glob("*.safetensors"))[0]
    data = bytearray(shard.read_bytes())
    data[-2:] = b"\xc0\x7f"  # NaN
    shard.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"damaged tensors \(1\).*1 NaN"):
        bundle_from_checkpoint(checkpoint, tmp_path / "bundle", MOVE)
    assert len(shards(checkpoint)) == 2


def test_another_file_system_is_refused(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Test double: hard links fail as they do from one file system to another."""

    def refuse(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(InputError, match=r"cannot be moved \(Invalid cross-device link\); put the bundle on the"):
        bundle_from_checkpoint(checkpoint, tmp_path / "bundle", MOVE)
    assert len(shards(checkpoint)) == 2


def test_a_move_cut_short_is_finished(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bundle is there, and one of the two files has still its old name too."""

    def cut_short(paths: list[Path]) -> None:
        paths[0].unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(export_module, "remove_sources", cut_short)
        with pytest.raises(KeyboardInterrupt):
            bundle_from_checkpoint(checkpoint, tmp_path / "bundle", MOVE)
    assert len(shards(checkpoint)) == 1
    bundle = bundle_from_checkpoint(checkpoint, tmp_path / "bundle", MOVE)
    assert shards(checkpoint) == {}
    assert bundle.verify(full=True).problems == ()


# Cut short


def export(checkpoint: Path, output: Path, *options: str) -> subprocess.Popen[str]:
    script = (
        "import mllama_exporter.placement as p; p._MAX_FILE_BYTES = 2_000_000\n"
        "from mllama_runtime.cli import main; main()"
    )
    command = [sys.executable, "-c", script, "export", str(checkpoint), str(output), "--dtype", "bf16", *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finished_units(folder: Path) -> dict[str, tuple[int, int]]:
    """Of an unfinished build beside the output: the files that are done, by inode and time."""
    found = {}
    for record in folder.glob(".bundle.partial-*/units/*.json"):
        for name in json.loads(record.read_bytes())["files"]:
            path = record.parents[1] / name
            found[name] = path.stat().st_ino, path.stat().st_mtime_ns
    return found


def killed_and_run_again(miniature: Path, folder: Path, expected: dict[str, str], seed: int, seconds: float) -> int:
    """Returns how many finished files were taken over."""
    output = folder / "bundle"
    process, chance = export(miniature, output), random.Random(seed)
    if seed % 2:  # anywhere
        time.sleep(chance.uniform(0, seconds))
    else:  # behind the tracing, which takes nearly all of the time
        assert process.stderr is not None
        while process.stderr.readline() not in ("writing the weights\n", ""):
            pass
        time.sleep(chance.uniform(0, 0.2))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    kept = finished_units(folder) if not output.exists() else {}
    again = export(miniature, output)
    stderr = again.communicate(timeout=300)[1]
    if again.returncode:  # the kill came after the end
        assert "the output folder is not empty" in stderr
    assert hashes(output) == expected
    assert [path.name for path in folder.iterdir()] == ["bundle"]
    for name, state in kept.items():
        assert (output / name).stat().st_ino == state[0], name
        assert (output / name).stat().st_mtime_ns == state[1], name
    shutil.rmtree(output)
    return len(kept)


def undisturbed(miniature: Path, folder: Path) -> tuple[dict[str, str], float]:
    start = time.monotonic()
    process = export(miniature, folder / "undisturbed")
    assert process.wait(timeout=300) == 0
    seconds = time.monotonic() - start
    expected = hashes(folder / "undisturbed")
    shutil.rmtree(folder / "undisturbed")
    return expected, seconds


@pytest.mark.slow
def test_fifty_kills(miniature: Path, tmp_path: Path) -> None:
    expected, seconds = undisturbed(miniature, tmp_path)
    taken = [killed_and_run_again(miniature, tmp_path, expected, seed, seconds) for seed in range(50)]
    assert sum(count > 0 for count in taken) > 3


def test_three_kills(miniature: Path, tmp_path: Path) -> None:
    expected, seconds = undisturbed(miniature, tmp_path)
    for seed in (1, 2, 3):
        killed_and_run_again(miniature, tmp_path, expected, seed, seconds)


@pytest.mark.usefixtures("many_files")
def test_finished_work_is_not_done_again(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that fills up at the third weights file: the graphs and two files stay, and the next export goes on."""
    write, written = export_module.write_weights, []

    def full_at_the_third(checkpoint, plan, path, **options):  # type: ignore[no-untyped-def]
        if len(written) == 2:
            path.write_bytes(b"half")
            raise ResourceError("the disk is full", where=path)
        written.append(path.name)
        return write(checkpoint, plan, path, **options)

    options = ExportOptions(precision="bf16")
    with monkeypatch.context() as patch:
        patch.setattr(export_module, "write_weights", full_at_the_third)
        with pytest.raises(ResourceError, match="the disk is full"):
            bundle_from_checkpoint(checkpoint, tmp_path / "bundle", options)
    kept = finished_units(tmp_path)
    assert {name for name in kept if name.startswith("weights")} == set(written)
    assert "decoder.onnx" in kept
    left = {path.name for path in next(tmp_path.glob(".bundle.partial-*-free-*")).iterdir()}
    assert left == {*kept, "units"}

    def no_tracing(*_: object) -> None:
        raise AssertionError("traced again")

    again = []
    monkeypatch.setattr(export_module, "_traced", no_tracing)
    monkeypatch.setattr(
        export_module, "write_weights", lambda *args, **named: (again.append(args[2].name), write(*args, **named))[1]
    )
    bundle = bundle_from_checkpoint(checkpoint, tmp_path / "bundle", options)
    names = {name for name in bundle.manifest.files if name.endswith(".safetensors")}
    assert set(again) == names - set(written)
    assert bundle.verify(full=True).problems == ()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "checkpoint"]


@pytest.mark.usefixtures("many_files")
def test_what_depends_on_something_else_is_done_again(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other options, and a checkpoint that was written to meanwhile, though its size is the same."""

    def full(*_: object, **__: object) -> None:
        raise ResourceError("the disk is full")

    def cut_short() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(export_module, "write_weights", full)
            with pytest.raises(ResourceError):
                bundle_from_checkpoint(checkpoint, tmp_path / "bundle", ExportOptions(precision="bf16"))
        assert len(list(tmp_path.glob(".bundle.partial-*"))) == 1

    cut_short()
    fp16 = bundle_from_checkpoint(checkpoint, tmp_path / "bundle", ExportOptions(precision="fp16"))
    assert fp16.manifest.precision == "fp16"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "checkpoint"]
    shutil.rmtree(fp16.root)

    cut_short()
    shard = sorted(checkpoint.glob("*.safetensors"))[0]
    time.sleep(0.01)
    shard.write_bytes(shard.read_bytes())
    traced, trace = [], export_module._traced
    monkeypatch.setattr(export_module, "_traced", lambda *args: (traced.append(1), trace(*args))[1])
    bundle_from_checkpoint(checkpoint, tmp_path / "bundle", ExportOptions(precision="bf16"))
    assert traced == [1]


# A small disk, and two at once


def test_a_disk_that_is_too_small_is_known_before_the_weights(miniature: Path, tmp_path: Path) -> None:
    point = tmp_path / "small"
    point.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", point], capture_output=True).returncode:
        pytest.skip("needs the right to mount")
    try:
        process = export(miniature, point / "bundle")
        _, stderr = process.communicate(timeout=300)
        assert process.returncode == 5
        last = stderr.splitlines()[-1]
        assert last.startswith("mllama: error: ")
        assert "the disk is full: expected" in last
        assert "bytes free; free some space and export again" in last
        (left,) = point.iterdir()  # the graphs, for the next time
        assert not list(left.glob("weights*"))
        subprocess.run(["mount", "-o", "remount,size=40m", point], check=True)
        again = export(miniature, point / "bundle")
        assert again.wait(timeout=300) == 0
        assert [path.name for path in point.iterdir()] == ["bundle"]
    finally:
        subprocess.run(["umount", point], check=True)


def test_two_exports_at_once(miniature: Path, tmp_path: Path) -> None:
    both = [export(miniature, tmp_path / "bundle") for _ in range(2)]
    answers = [process.communicate(timeout=300)[1] for process in both]
    codes = sorted(process.returncode for process in both)
    assert codes == [0, 3], answers
    loser = next(answer for process, answer in zip(both, answers, strict=True) if process.returncode)
    assert loser.splitlines()[-1].startswith("mllama: error: ")
    assert "another export has made this bundle meanwhile" in loser or "the output folder is not empty" in loser
    assert Bundle.open(tmp_path / "bundle").verify(full=True).problems == ()
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
