"""Makes a bundle: a hidden folder beside the output is filled, checked, and renamed at the very end.

So a bundle either is whole or is not there, whatever happens in between. Units of work that are finished and recorded
survive a kill and a full disk: the next build that depends on the same goes on from there. The exporter is the only
user.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

from mllama_runtime.bundle import Bundle
from mllama_runtime.disk import disk_error, disk_faults, file_sha256, is_full, sync, write_whole
from mllama_runtime.errors import InputError, ResourceError, UsageError
from mllama_runtime.manifest import MANIFEST_NAME, FileEntry, Manifest, is_inner_path
from mllama_runtime.partials import claimed_folder, freed_folder

_UNITS = "units"  # a folder of records, gone before the manifest is written


class BundleWriter:
    """`with BundleWriter(output) as writer:` write files below `writer.path`, add each, then commit the manifest.

    Leaving the block without `commit`, by an exception, Ctrl-C or a signal turned into one, removes everything, but on
    a full disk what is finished. A full disk (OSError) within the block becomes a ResourceError, and a fault of the
    folder itself an InputError.

    Args:
        output: the bundle to make; absent, or an empty folder.
        not_inside: the checkpoint's folder; `output` may be neither it nor below it.
        key: everything that the units depend on.

    Raises:
        InputError: the output cannot be made there.
    """

    def __init__(self, output: Path, *, not_inside: Path | None = None, key: str = "") -> None:
        try:
            self.output = output.resolve()
        except (OSError, ValueError, RuntimeError) as fault:  # a deleted working folder, a null character, a loop
            raise InputError(f"cannot be found ({fault})", where=output) from fault
        self.path, self._key = self.output, key  # the path is known when the block is entered
        self._files: dict[str, FileEntry] = {}
        self._committed = False
        with disk_faults(self.output):
            _check_output(self.output, not_inside)

    def __enter__(self) -> BundleWriter:
        with disk_faults(self.output):
            self.path = claimed_folder(self.output, self._key)
            self._keep_finished()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._committed:
            self._leave(keep=isinstance(fault, ResourceError) or (isinstance(fault, OSError) and is_full(fault)))
        if isinstance(fault, OSError) and self._is_ours(fault):
            raise disk_error(fault, self.output) from fault

    def add_file(self, name: str, *, sha256: str | None = None) -> FileEntry:
        """Take a finished file of `path` into the bundle.

        Args:
            name: its path below `path`, with forward slashes.
            sha256: its hash if it was computed while writing; else it is read once more.

        Raises:
            UsageError: a name that leads out of the folder.
        """
        if not is_inner_path(name):
            raise UsageError("not a path inside the bundle", where=name)
        path = self.path / name
        entry = FileEntry(path.stat().st_size, sha256 or file_sha256(path))
        self._files[name] = entry
        return entry

    def finished(self, unit: str) -> Any:
        """What `finish` was given when the unit was finished, now or by a build before; None if it never was."""
        return next((record["value"] for name, record in self._records() if name == unit), None)

    def finish(self, unit: str, names: Sequence[str], value: object) -> None:
        """Record that a unit is done: its files are flushed first.

        Args:
            names: of its files, below `path`.
            value: what `finished` will give, in JSON's types.
        """
        sizes = {name: (self.path / name).stat().st_size for name in names}
        for name in names:
            sync(self.path / name)
        sync(self.path)
        (self.path / _UNITS).mkdir(exist_ok=True)
        record = json.dumps({"files": sizes, "value": value}).encode()
        write_whole(self.path / _UNITS / f"{unit}.json", record)

    def _records(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """By unit, of those whose files are there."""
        for path in sorted((self.path / _UNITS).glob("*.json")):
            record = json.loads(path.read_bytes())
            sizes = {self.path / name: size for name, size in record["files"].items()}
            if all(file.is_file() and file.stat().st_size == size for file, size in sizes.items()):
                yield path.stem, record

    def _keep_finished(self) -> bool:
        """Remove what belongs to no finished unit; whether anything is left."""
        records = dict(self._records())
        kept = {name for record in records.values() for name in record["files"]}
        kept |= {f"{_UNITS}/{unit}.json" for unit in records}
        for path in sorted(self.path.rglob("*"), reverse=True):
            if path.is_dir() and not path.is_symlink():
                with suppress(OSError):  # it is not empty
                    path.rmdir()
            elif path.relative_to(self.path).as_posix() not in kept:
                path.unlink()
        return bool(records)

    def _leave(self, *, keep: bool) -> None:
        # What cannot be removed is not worth hiding the fault that led here.
        with suppress(OSError):
            if keep and self.path != self.output and self._keep_finished():
                freed_folder(self.path, self.output, self._key)
                return
        if self.path != self.output:
            shutil.rmtree(self.path, ignore_errors=True)

    def commit(self, manifest: Manifest) -> Bundle:
        """Write the manifest with the files added, check the whole, flush it to the disk, and give it its name.

        Args:
            manifest: complete but for `files`.

        Raises:
            BundleError: a file was changed after it was added, or never added, or the manifest is wrong.
            InputError: another export made the output meanwhile; that one stands.
        """
        with disk_faults(self.output):
            shutil.rmtree(self.path / _UNITS, ignore_errors=True)
            for folder, _, names in os.walk(self.path, topdown=False):
                for name in names:
                    sync(Path(folder, name))
                sync(Path(folder))
            write_whole(self.path / MANIFEST_NAME, replace(manifest, files=self._files).to_json())
            checked = Bundle.open(self.path)
            self._rename()
            sync(self.output.parent)
        return replace(checked, root=self.output)

    def _rename(self) -> None:
        try:
            self.path.rename(self.output)
        except OSError as fault:
            if fault.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            hint = "the other one stands, this one is discarded"
            raise InputError("another export has made this bundle meanwhile", where=self.output, hint=hint) from None
        self._committed = True

    def _is_ours(self, fault: OSError) -> bool:
        """Whether an OSError is about the folder being written, not about something read beside it."""
        if is_full(fault):  # a copy names what it read
            return True
        return fault.filename is not None and Path(os.fsdecode(fault.filename)).is_relative_to(self.path)


def _check_output(output: Path, not_inside: Path | None) -> None:
    hint = "name a new folder elsewhere"
    if not_inside and any(folder.exists() and folder.samefile(not_inside) for folder in (output, *output.parents)):
        raise InputError("the output is the checkpoint's own folder, or inside it", where=output, hint=hint)
    if os.path.ismount(output):
        hint = f"name a new folder inside it, such as {output / 'bundle'}"
        raise InputError("the output is a mount point, which a finished bundle cannot replace", where=output, hint=hint)
    if output.exists() and not output.is_dir():
        raise InputError("the output is a file", where=output, hint=hint)
    if output.exists() and any(output.iterdir()):
        raise InputError("the output folder is not empty", where=output, hint="name a new folder, or remove this one")
    if not output.parent.is_dir():
        raise InputError("no such folder to put the bundle in", where=output.parent, hint="make it first")
