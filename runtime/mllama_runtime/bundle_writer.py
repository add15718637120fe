"""Makes a bundle: a hidden folder beside the output is filled, checked, and renamed at the very end.

So a bundle either is whole or is not there, whatever happens in between. The exporter is the only user.
"""

from __future__ import annotations

import errno
import os
import shutil
from dataclasses import replace
from pathlib import Path
from types import TracebackType

from mllama_runtime.bundle import Bundle
from mllama_runtime.disk import disk_error, disk_faults, file_sha256, is_full, partial_path, sync, write_whole
from mllama_runtime.errors import InputError, UsageError
from mllama_runtime.manifest import MANIFEST_NAME, FileEntry, Manifest, is_inner_path


class BundleWriter:
    """`with BundleWriter(output) as writer:` write files below `writer.path`, add each, then commit the manifest.

    Leaving the block without `commit`, by an exception, Ctrl-C or a signal turned into one, removes everything. A full
    disk (OSError) within the block becomes a ResourceError, and a fault of the folder itself an InputError.

    Args:
        output: the bundle to make; absent, or an empty folder.
        not_inside: the checkpoint's folder; `output` may be neither it nor below it.

    Raises:
        InputError: the output cannot be made there.
    """

    def __init__(self, output: Path, *, not_inside: Path | None = None) -> None:
        try:
            self.output = output.resolve()
        except (OSError, ValueError, RuntimeError) as fault:  # a deleted working folder, a null character, a loop
            raise InputError(f"cannot be found ({fault})", where=output) from fault
        self.path = partial_path(self.output)
        self._files: dict[str, FileEntry] = {}
        self._committed = False
        with disk_faults(self.output):
            _check_output(self.output, not_inside)

    def __enter__(self) -> BundleWriter:
        with disk_faults(self.output):
            self.path.mkdir()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._committed:
            # What cannot be removed is not worth hiding the fault that led here.
            shutil.rmtree(self.path, ignore_errors=True)
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

    def commit(self, manifest: Manifest) -> Bundle:
        """Write the manifest with the files added, check the whole, flush it to the disk, and give it its name.

        Args:
            manifest: complete but for `files`.

        Raises:
            BundleError: a file was changed after it was added, or never added, or the manifest is wrong.
            InputError: another export made the output meanwhile; that one stands.
        """
        with disk_faults(self.output):
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
