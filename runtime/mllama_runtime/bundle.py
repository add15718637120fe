"""A bundle folder: opened and checked by sessions, verified by people, stamped with a verdict, given engines.

The manifest says what must be there. Every listed file must be a plain file: a symbolic link would lead out of what the
manifest covers (and ONNX Runtime refuses external data behind one that leaves the folder), while a second hard link is
harmless, so snapshots made with them work. `bundle_writer` makes bundles; nothing here changes a file in place.
"""

from __future__ import annotations

import hashlib
import os
import posixpath
import re
import shutil
import stat
from collections.abc import Callable, Mapping
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from queue import SimpleQueue
from threading import Event

from mllama_runtime.disk import disk_faults, file_sha256, sync, write_whole
from mllama_runtime.errors import BundleError, UsageError
from mllama_runtime.manifest import (
    MANIFEST_NAME,
    MAX_MANIFEST_BYTES,
    EngineEntry,
    FileEntry,
    Manifest,
    Validation,
    is_inner_path,
)
from mllama_runtime.onnxfile import external_tensors
from mllama_runtime.tensorfile import read_header

QUICK_HASH_BYTES = 64 * 2**20  # a quick check hashes files up to this size: graphs and tokenizer, not real weights

# What an interrupted `stamp` or `add_engine` may leave. Nothing reads it: sessions pass over it, `verify` names it.
_LEFTOVER = re.compile(r"reports/|engines/|(.*/)?\.[^/]+\.partial-[0-9a-f]{8}$")


@dataclass(frozen=True, slots=True)
class Problem:
    """One file of a bundle that is not what the manifest says."""

    path: str
    what: str
    expected: str | None = None
    found: str | None = None

    def __str__(self) -> str:
        sides = [f"{side} {text}" for side, text in (("expected", self.expected), ("found", self.found)) if text]
        return f"{self.path}: {self.what}" + (f": {', '.join(sides)}" if sides else "")


@dataclass(frozen=True, slots=True)
class Verification:
    """What `Bundle.verify` saw; at most one problem for each file, sorted by path."""

    full: bool
    num_files: int
    num_hashed_bytes: int
    problems: tuple[Problem, ...]


@dataclass(frozen=True, slots=True)
class Bundle:
    """A bundle whose manifest has been read; `root` is absolute and free of links."""

    root: Path
    manifest: Manifest

    @classmethod
    def read(cls, path: Path) -> Bundle:
        """Read the manifest alone; the files may be in any state.

        Raises:
            BundleError: no folder, no manifest, or one that is wrong.
        """
        try:
            root = path.resolve()
        except (OSError, ValueError, RuntimeError) as fault:  # a deleted working folder, a null character, a loop
            raise BundleError(f"cannot be found ({fault})", where=path) from fault
        where = root / MANIFEST_NAME
        try:
            if not stat.S_ISREG(where.lstat().st_mode):
                raise BundleError("the manifest is not a plain file", where=where)
            with where.open("rb") as file:
                data = file.read(MAX_MANIFEST_BYTES + 1)
        except FileNotFoundError:
            if root.is_dir():
                hint = "name a folder that `mllama export` has made"
                raise BundleError("not a bundle: it has no manifest", where=where, hint=hint) from None
            raise BundleError("no such folder", where=path) from None
        except OSError as fault:
            raise BundleError(f"cannot be read ({fault.strerror})", where=where) from fault
        return cls(root, Manifest.from_json(data, where))

    @classmethod
    def open(cls, path: Path, *, full: bool = False, engines: bool = True) -> Bundle:
        """Read the manifest and check the files, as `verify` does: what every session does first.

        Args:
            engines: whether the files of engines count; who builds them again does not mind their state.

        Raises:
            BundleError: naming the first file that is wrong.
        """
        bundle = cls.read(path)
        problems = [
            problem
            for problem in bundle.verify(full=full).problems
            if not bundle._is_leftover(problem.path) and (engines or not problem.path.startswith("engines/"))
        ]
        if problems:
            first, others = problems[0], len(problems) - 1
            raise BundleError(
                first.what + (f" (and {others} more problems)" if others else ""),
                where=bundle.root / first.path,
                expected=first.expected,
                found=first.found,
                hint=f"see `mllama verify`, then copy or export the bundle again{_link_hint(first)}",
            )
        return bundle

    def path(self, name: str) -> Path:
        """Where a listed file is.

        Raises:
            BundleError: the manifest does not list it.
        """
        if name not in self.manifest.files:
            raise BundleError("the bundle has no such file", where=self.root / name)
        return self.root / name

    def verify(self, *, full: bool, progress: Callable[[int], object] | None = None) -> Verification:
        """Compare every file with the manifest, and name the files it does not list.

        Links, sizes, safetensors headers and the external data of ONNX files are always checked, and so is the SHA-256
        of files up to 64 MiB; `full` hashes all, one file a core at a time.

        Args:
            progress: called with a number of bytes whenever so many more are hashed.

        Raises:
            BundleError: the folder cannot be listed.
        """
        present = self._inventory()
        files = self.manifest.files
        problems = {name: self._glance(name, entry, present.get(name)) for name, entry in files.items()}
        hashed = [
            name
            for name, problem in problems.items()
            if problem is None and (full or files[name].size_bytes <= QUICK_HASH_BYTES)
        ]
        problems.update(self._hash(hashed, progress))
        for name in present.keys() - files.keys() - {MANIFEST_NAME}:
            problems[name] = Problem(name, "not listed in the manifest", found=_kind(present[name]))
        return Verification(
            full=full,
            num_files=len(files),
            num_hashed_bytes=sum(files[name].size_bytes for name in hashed),
            problems=tuple(problem for _, problem in sorted(problems.items()) if problem),
        )

    def stamp(self, validation: Validation, reports: Mapping[str, bytes]) -> Bundle:
        """Write report files and put a verdict into the manifest; a crash leaves a bundle with a verdict or without.

        Engines stay as they are on the disk by then.

        Args:
            reports: path below reports/ -> content; `validation.report` is one of them.

        Raises:
            UsageError: a report outside reports/.
            BundleError: the bundle was replaced since it was opened.
            InputError: the bundle is read-only.
            ResourceError: the disk is full.
        """
        for name in reports:
            if not (name.startswith("reports/") and is_inner_path(name)):
                raise UsageError("a report belongs below reports/", where=name)
        now = Bundle.read(self.root).manifest
        for name, entry in self.manifest.files.items():
            if not name.startswith(("reports/", "engines/")) and now.files.get(name) != entry:
                hint = "validate it again"
                raise BundleError("the bundle has become another one meanwhile", where=self.root / name, hint=hint)
        others = {name: entry for name, entry in now.files.items() if name not in reports}
        entries = {name: FileEntry(len(data), hashlib.sha256(data).hexdigest()) for name, data in reports.items()}
        bare = replace(now, validation=None, files=others)
        stamped = replace(now, validation=validation, files=others | entries)
        where = self.root / MANIFEST_NAME
        Manifest.from_json(stamped.to_json(), where)  # what is written can be read
        with disk_faults(self.root):
            if bare != now:  # the old verdict goes before its report does
                write_whole(where, bare.to_json())
            for name, data in reports.items():
                (self.root / name).parent.mkdir(parents=True, exist_ok=True)
                write_whole(self.root / name, data)
            write_whole(where, stamped.to_json())
        return Bundle(self.root, stamped)

    def add_engine(self, folder: Path, entry: EngineEntry) -> Bundle:
        """Move a finished engine into the bundle and list it; after a crash it is there whole, or not at all.

        The rest of the manifest, the verdict too, stays as it is on the disk by then.

        Args:
            folder: holds the engine's files and nothing else, on the bundle's own file system.

        Raises:
            InputError: the bundle is read-only.
            ResourceError: the disk is full.
        """
        home = self.root / "engines" / entry.key
        with disk_faults(self.root):
            hashes = {path.name: FileEntry(path.stat().st_size, file_sha256(path)) for path in folder.iterdir()}
            for name in hashes:
                sync(folder / name)
            sync(folder)
            if home.exists():  # of a build that was killed before it could list it
                shutil.rmtree(home)
            folder.rename(home)
            sync(home.parent)
            now = Bundle.read(self.root).manifest
            files = dict(now.files) | {f"engines/{entry.key}/{name}": found for name, found in hashes.items()}
            engines = (*(other for other in now.engines if other.key != entry.key), entry)
            listed = replace(now, files=files, engines=engines)
            where = self.root / MANIFEST_NAME
            Manifest.from_json(listed.to_json(), where)  # what is written can be read
            write_whole(where, listed.to_json())
        return Bundle(self.root, listed)

    def _is_leftover(self, name: str) -> bool:
        return name not in self.manifest.files and _LEFTOVER.match(name) is not None

    def _inventory(self) -> dict[str, os.stat_result]:
        """Everything in the folder that is not itself a folder, links not followed."""
        found: dict[str, os.stat_result] = {}
        folders = [self.root]
        while folders:
            folder = folders.pop()
            try:
                for path in folder.iterdir():
                    status = path.lstat()
                    if stat.S_ISDIR(status.st_mode):
                        folders.append(path)
                    else:
                        found[path.relative_to(self.root).as_posix()] = status
            except PermissionError:  # such as lost+found: what the manifest lists there will be missed
                continue
            except OSError as fault:
                raise BundleError(f"cannot be listed ({fault.strerror})", where=folder) from fault
        return found

    def _glance(self, name: str, entry: FileEntry, found: os.stat_result | None) -> Problem | None:
        """Everything about one listed file but its hash."""
        if found is None:
            return Problem(name, "missing", expected=f"{entry.size_bytes} bytes")
        if not stat.S_ISREG(found.st_mode):
            return Problem(name, "not a plain file", found=_kind(found))
        if found.st_size != entry.size_bytes:
            expected, size = f"{entry.size_bytes} bytes", f"{found.st_size} bytes"
            return Problem(name, "wrong size", expected=expected, found=size)
        try:
            if name.endswith(".safetensors"):
                read_header(self.root / name, error=BundleError)
            elif name.endswith(".onnx"):
                return self._external_data(name)
        except BundleError as error:
            return Problem(name, error.what, _text(error.expected), _text(error.found))
        return None

    def _external_data(self, name: str) -> Problem | None:
        """A graph may point at listed weights files only, and within their size."""
        for tensor in external_tensors(self.root / name):
            what = f"the external data of tensor {tensor.name!r} is outside the bundle's weights"
            target = posixpath.join(posixpath.dirname(name), tensor.location)
            entry = self.manifest.files.get(target)
            if entry is None or not target.endswith(".safetensors"):
                return Problem(name, what, "a weights file listed in the manifest", repr(tensor.location))
            end = tensor.offset + tensor.length
            if end > entry.size_bytes:
                return Problem(name, what, f"at most {entry.size_bytes} bytes of {target}", f"byte {end}")
        return None

    def _hash(self, names: list[str], progress: Callable[[int], object] | None) -> dict[str, Problem]:
        """Problems of the files whose content is not what the manifest says; the largest files go first."""
        files = self.manifest.files
        stop = Event()
        counts: SimpleQueue[int | None] = SimpleQueue()  # bytes hashed; None when a file is done

        def tick(num_bytes: int) -> None:
            if stop.is_set():
                raise CancelledError
            counts.put(num_bytes)

        def check(name: str) -> Problem | None:
            try:
                digest = file_sha256(self.root / name, tick)
            except OSError as fault:
                return Problem(name, f"cannot be read ({fault.strerror})")
            finally:
                counts.put(None)
            if digest != files[name].sha256:
                return Problem(name, "wrong content", f"sha256 {files[name].sha256}", digest)
            return None

        order = sorted(names, key=lambda name: -files[name].size_bytes)
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            try:
                results = pool.map(check, order)
                for _ in order:
                    while (num_bytes := counts.get()) is not None:
                        if progress:
                            progress(num_bytes)
                return {problem.path: problem for problem in results if problem}
            except BaseException:  # an interrupt must not wait for files of many gigabytes
                stop.set()
                raise


def _kind(found: os.stat_result) -> str:
    return (
        "a symbolic link"
        if stat.S_ISLNK(found.st_mode)
        else "a file"
        if stat.S_ISREG(found.st_mode)
        else "a special file"
    )


def _link_hint(problem: Problem) -> str:
    return " (`cp -rL` replaces links by files)" if problem.found == "a symbolic link" else ""


def _text(value: object) -> str | None:
    return None if value is None else str(value)
