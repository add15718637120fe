"""Files on a disk that may fill up, be read-only or lose power: hashing, atomic writes, and errors people understand.

Bundles are written and stamped through here.
"""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mllama_runtime.errors import InputError, ResourceError

_CHUNK_BYTES = 2**20


def file_sha256(path: Path, progress: Callable[[int], object] | None = None) -> str:
    """SHA-256 of a file as hexadecimal digits, in 1 MiB of memory; the lock of the interpreter is free meanwhile.

    Args:
        progress: called after every chunk with its bytes; what it raises ends the work.

    Raises:
        OSError: the file cannot be read.
    """
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(_CHUNK_BYTES))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            if progress:
                progress(count)
    return digest.hexdigest()


@contextmanager
def disk_faults(path: Path) -> Iterator[None]:
    """Turn an OSError of writing `path` into an error for people.

    Raises:
        ResourceError: the disk or a quota is full.
        InputError: anything else, such as a folder that is read-only or absent.
    """
    try:
        yield
    except OSError as fault:
        raise disk_error(fault, path) from fault


def disk_error(fault: OSError, path: Path) -> InputError | ResourceError:
    """The error for people that an OSError of writing `path` stands for."""
    reason = fault.strerror or str(fault)
    if is_full(fault):
        return ResourceError(f"the disk is full ({reason})", where=path, hint="free some space, or write elsewhere")
    return InputError(f"cannot be written ({reason})", where=path)


def is_full(fault: OSError) -> bool:
    """Whether an OSError says that a disk, a quota or a file's largest size is used up."""
    return fault.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def partial_path(path: Path) -> Path:
    """A new hidden name beside `path`, for what becomes `path` once it is whole."""
    return path.with_name(f".{path.name[:40]}.partial-{secrets.token_hex(4)}")


def write_whole(path: Path, data: bytes) -> None:
    """Write or replace a file so that after any crash it is either the old one or the new one.

    Raises:
        OSError: it cannot be written; the old file still stands.
    """
    partial = partial_path(path)
    try:
        partial.write_bytes(data)
        sync(partial)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync(path.parent)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, have reached the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as fault:  # some network file systems cannot sync a folder, and need not
        if not (path.is_dir() and fault.errno in (errno.EINVAL, errno.ENOTSUP)):
            raise
    finally:
        os.close(descriptor)
