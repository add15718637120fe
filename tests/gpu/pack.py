"""What a machine with a GPU and no network is brought, in parts: `python -m gpu.pack [--out .silicon] [--ort WHEEL]`.

    OUT/ort-a, OUT/ort-b     onnxruntime-gpu for that machine's Python, with the machine code of one kind of GPU only
    OUT/mini-a, OUT/mini-b   the miniature's bundles, and what the CPU answers on them
    OUT/eight, OUT/full      skeletons of 8 layers at full width, and of the 11B model (`gpu.skeleton`)

Every part is a folder with one .tar.xz; `gpu.unpack` opens it there. What has not changed is not made again.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import lzma
import os
import shutil
import struct
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
from gpu.mini import expectation
from gpu.skeleton import SKELETONS, config_of, skeleton
from mllama_exporter.export import saved_graphs
from mllama_runtime.bundle import Bundle
from mllama_runtime.bundle_writer import BundleWriter
from mllama_runtime.manifest import GraphKey

ROOT = Path(__file__).parents[2]
MINIATURE = ROOT / "recipes" / "miniature"
PARTS: Mapping[str, Sequence[str]] = {
    "mini-a": ("fp16", "bf16", "fp32"),
    "mini-b": ("int4", "int8-weight", "int8", "fp8"),
}
CALLS = (("ort-a", "mini-a"), ("ort-b", "mini-b"), ("eight",), ("full",))
"""What is brought together."""
MAX_CALL_BYTES = 62 * 2**20
_PROVIDER = "onnxruntime/capi/libonnxruntime_providers_cuda.so"
_LEFT_OUT = ("/tools/", "/transformers/", "/quantization/", "/datasets/", "ThirdPartyNotices", "libonnxruntime.so")
_LEFT_OUT_ENDS = ("_tensorrt.so",)
_SHARE = 0.64  # of the provider's bytes, its first ones, that the first part takes: they compress best
_TWINS = ("/cuda_", "/ort_", "/graph_edit", "/sampling_graphs")
_ELSEWHERE = (
    "/validate/",
    "/cli/",
    "/engines/",
    "/device/",
    "/backends/static",
    "/backends/slots",
    "/backends/device_",
)
"""Parts of names of sources that no bundle and no answer of the CPU depends on."""
_FATBIN, _CUBIN = 0xBA55ED50, 2


def keep_machine_code(data: bytearray, arch: int) -> int:
    """Zero the machine code of all other GPUs in a shared object, in place; how many bytes. Every offset stays."""
    position = num_zeroed = 0
    while 0 <= (position := data.find(struct.pack("<I", _FATBIN), position)) <= len(data) - 16:
        _, version, header, size = struct.unpack_from("<IHHQ", data, position)
        if version != 1 or header != 16 or not 0 < size <= len(data):
            position += 4
            continue
        entry, end = position + header, position + header + size
        while entry < end:
            kind, _, header, size = struct.unpack_from("<HHIQ", data, entry)
            start = entry + header
            if not (kind == _CUBIN and struct.unpack_from("<I", data, entry + 28)[0] == arch):
                data[start : start + size] = bytes(size)
                num_zeroed += size
            entry = start + size
        position = end
    return num_zeroed


def pack_ort(wheel: Path, out: Path, arch: int) -> None:
    """Two parts of about the same size: the provider is cut in two."""
    stamp = f"{wheel.name} {wheel.stat().st_size} {arch} {_SHARE}"
    stamps = [out / part / "stamp" for part in ("ort-a", "ort-b")]
    if all(path.exists() and path.read_text() == stamp for path in stamps):
        return
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if _is_needed(name)]
        files = {name: archive.read(name) for name in names}
    provider = bytearray(files.pop(_PROVIDER))
    print(f"zeroed {keep_machine_code(provider, arch) / 1e6:.0f} MB of {len(provider) / 1e6:.0f}", flush=True)
    cut = int(len(provider) * _SHARE)
    halves = {
        "ort-a": {f"{_PROVIDER}.0": bytes(provider[:cut])},
        "ort-b": {f"{_PROVIDER}.1": bytes(provider[cut:]), **files},
    }
    with ProcessPoolExecutor(2) as pool:
        list(pool.map(_write_part, [out / name for name in halves], [list(half.items()) for half in halves.values()]))
    for part in halves:
        (out / part / "stamp").write_text(stamp)


def _is_needed(name: str) -> bool:
    unwanted = any(part in name for part in _LEFT_OUT) or name.endswith(_LEFT_OUT_ENDS)
    return name.startswith("onnxruntime/") and not name.endswith("/") and not unwanted


def _write_part(folder: Path, files: Iterable[tuple[str, bytes]]) -> None:
    """One .tar.xz, the same bytes for the same files; one that holds these already stays."""
    files = list(files)
    digest = hashlib.sha256(b"".join(hashlib.sha256(data).digest() + name.encode() for name, data in files)).hexdigest()
    stamp = folder / "contents"
    if stamp.exists() and stamp.read_text() == digest:
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    filters = [
        {"id": lzma.FILTER_X86},
        {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": 1 << 27},
    ]
    with (
        lzma.open(folder / f"{folder.name}.tar.xz", "wb", filters=filters) as packed,
        tarfile.open(fileobj=packed, mode="w") as tar,
    ):
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(data), 0o755
            tar.addfile(info, io.BytesIO(data))
    stamp.write_text(digest)


def pack_mini(out: Path, work: Path) -> None:
    """The bundles, and what the CPU makes of them; where only twins of graphs have changed, these alone are new."""
    (work / "mini").mkdir(parents=True, exist_ok=True)
    questions = work / "calibration" / "questions.jsonl"
    if not questions.exists():
        task = [MINIATURE / "task.py", questions.parent, "--split", "calibration", "--count", "128"]
        subprocess.run([sys.executable, *task], check=True)
    with ProcessPoolExecutor(2, max_tasks_per_child=1) as pool:
        for precisions in (PARTS["mini-a"], PARTS["mini-b"]):
            list(pool.map(_mini_bundle, [work / "mini"] * len(precisions), precisions))
        files = [[each for name in names for each in _of_mini(work / "mini", name)] for names in PARTS.values()]
        list(pool.map(_write_part, [out / part for part in PARTS], files))


def _mini_bundle(folder: Path, precision: str) -> None:
    bundle, made, twins = folder / precision, folder / f"{precision}.made", folder / f"{precision}.twins"
    base, all_of_them = _sources(_is_of_weights), _sources(lambda _: True)
    if not bundle.exists() or not made.exists() or made.read_text() != base:
        shutil.rmtree(bundle, ignore_errors=True)
        if precision in PARTS["mini-a"]:
            _mllama("export", MINIATURE / "checkpoint", bundle, "--dtype", precision)
        else:
            questions = folder.parent / "calibration" / "questions.jsonl"
            data = () if precision == "int8-weight" else ("--calibration", questions)
            _mllama("quantize", folder / "fp16", bundle, "--scheme", precision, *data)
    elif not twins.exists() or twins.read_text() != all_of_them:
        with_new_twins(bundle)
    made.write_text(base)
    twins.write_text(all_of_them)
    _expect(bundle, folder / f"{precision}.npz")


def with_new_twins(folder: Path) -> None:
    """The same bundle, its graphs for ONNX Runtime made again from the standard ones."""
    bundle = Bundle.open(folder)
    manifest, fresh = bundle.manifest, folder.with_name(f"{folder.name}.fresh")
    shutil.rmtree(fresh, ignore_errors=True)
    keys: tuple[GraphKey, ...] = ("vision", "decoder")
    graphs: dict[GraphKey, ir.Model] = {key: ir.load(bundle.path(manifest.graphs[key].file)) for key in keys}
    old = {spec.file for spec in manifest.graphs.values()}
    with BundleWriter(fresh) as writer:
        for name, entry in manifest.files.items():
            if name not in old:
                os.link(bundle.path(name), writer.path / name)
                writer.add_file(name, sha256=entry.sha256)
        specs = saved_graphs(graphs, writer.path, manifest.model)
        for spec in specs.values():
            writer.add_file(spec.file)
        writer.commit(replace(manifest, graphs=specs, files={}))
    shutil.rmtree(folder)
    fresh.rename(folder)


def _expect(bundle: Path, path: Path) -> None:
    """What the CPU answers, anew where something it depends on has changed."""
    digest = hashlib.sha256(_sources(lambda name: name.startswith(("runtime", "tests"))).encode())
    for name in ("vision.ort.onnx", "decoder.ort.onnx", "weights.safetensors", "tokenizer.json"):
        digest.update((bundle / name).read_bytes())
    stamp = path.with_suffix(".expected")
    if not (path.exists() and stamp.exists() and stamp.read_text() == digest.hexdigest()):
        buffer = io.BytesIO()
        np.savez(buffer, **expectation(bundle))  # type: ignore[arg-type]
        path.write_bytes(buffer.getvalue())
        stamp.write_text(digest.hexdigest())


def _mllama(*arguments: object) -> None:
    command = [sys.executable, "-c", "from mllama_runtime.cli import main; main()", *map(str, arguments)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _of_mini(folder: Path, precision: str) -> Iterable[tuple[str, bytes]]:
    yield f"mini/{precision}.npz", (folder / f"{precision}.npz").read_bytes()
    for path in sorted((folder / precision).iterdir()):
        yield f"mini/{precision}/{path.name}", path.read_bytes()


def pack_skeletons(out: Path, work: Path) -> None:
    """Each without its weights; the judge's configuration beside it."""
    parts: dict[str, list[tuple[str, bytes]]] = {"eight": [], "full": []}
    sources = _sources(lambda name: name.startswith("exporter") or "manifest" in name or "tests" in name)
    for wanted in SKELETONS:
        root = work / "skeletons" / wanted.name
        stamp = work / "skeletons" / f"{wanted.name}.stamp"
        if not (stamp.exists() and stamp.read_text() == sources):
            root.parent.mkdir(parents=True, exist_ok=True)
            skeleton(wanted, root, work)
            stamp.write_text(sources)
        part = parts["eight" if wanted.name.startswith("8of40") else "full"]
        part.append((f"{wanted.name}.config.json", config_of(wanted, work)))
        for path in sorted(root.iterdir()):
            if path.suffix != ".safetensors":
                part.append((f"{wanted.name}/{path.name}", path.read_bytes()))
                continue
            with path.open("rb") as file:
                length = file.read(8)
                header = length + file.read(int.from_bytes(length, "little"))
            part.append((f"{wanted.name}/{path.name}.header", header))
    for name, files in parts.items():
        _write_part(out / name, files)


def _sources(counts: Callable[[str], bool]) -> str:
    """Of what bundles and answers are made by, as far as it counts."""
    digest = hashlib.sha256()
    for folder in ("exporter", "runtime", "tests/gpu"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            name = path.relative_to(ROOT).as_posix()
            kit = folder == "tests/gpu" and path.name not in ("skeleton.py", "fill.py", "mini.py", "forced.py")
            if not kit and not any(part in name for part in _ELSEWHERE) and counts(name):
                digest.update(path.read_bytes())
    return digest.hexdigest()


def _is_of_weights(name: str) -> bool:
    """Whether weights and standard graphs depend on it."""
    return name.startswith("exporter") and not any(part in name for part in _TWINS)


def tree_bytes() -> int:
    """Of the files of the repository that travel with every call."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, check=True, capture_output=True).stdout.split(b"\0")
    paths = [ROOT / os.fsdecode(name) for name in listed if name]
    return sum(path.stat().st_size for path in paths if path.exists())


def report(out: Path) -> bool:
    """Print what each call carries; whether all of it is allowed."""
    tree, fits = tree_bytes(), True
    print(f"tree {tree:,} bytes")
    for parts in CALLS:
        sizes = {part: sum(path.stat().st_size for path in (out / part).rglob("*") if path.is_file()) for part in parts}
        total = tree + sum(sizes.values())
        fits &= total <= MAX_CALL_BYTES
        shown = ", ".join(f"{part} {size:,}" for part, size in sizes.items())
        print(f"call with {shown}: {total:,} bytes", "" if total <= MAX_CALL_BYTES else f"MORE THAN {MAX_CALL_BYTES:,}")
    return fits


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / ".silicon")
    parser.add_argument("--work", type=Path, default=ROOT / "out" / "silicon", help="what is kept for the next time")
    parser.add_argument("--ort", type=Path, help="wheel of onnxruntime-gpu for the machine's Python")
    parser.add_argument("--arch", type=int, default=90, help="compute capability of its GPU, times ten")
    parser.add_argument("--only", choices=["ort", "mini", "skeletons"], action="append")
    arguments = parser.parse_args()
    chosen = arguments.only or ["ort", "mini", "skeletons"]
    arguments.out.mkdir(parents=True, exist_ok=True)
    arguments.work.mkdir(parents=True, exist_ok=True)
    if arguments.ort and "ort" in chosen:
        pack_ort(arguments.ort, arguments.out, arguments.arch)
    if "mini" in chosen:
        pack_mini(arguments.out, arguments.work)
    if "skeletons" in chosen:
        pack_skeletons(arguments.out, arguments.work)
    return 0 if report(arguments.out) else 1


if __name__ == "__main__":
    sys.exit(main())
