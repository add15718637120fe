"""Unfinished folders beside an output: each has an owner, and what a dead one left is taken over or cleared away.

A folder's name says all: `.OUTPUT.partial-KEY-OWNER`. KEY is what the work depends on; OWNER is the process that works
there, or "free". Taking one over is a rename, of which only one process succeeds: no lock is needed, and none is
trusted, for on some network file systems they silently lock nothing.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import shutil
import socket
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_FREE = "free"
_NAME = re.compile(r"-(?P<key>[0-9a-f]{16})-(?P<owner>free|[0-9a-f]{8}-[0-9a-f]{8}-[0-9a-f]{8}-\d+-\d+)-[0-9a-f]{8}")


@dataclass(frozen=True, slots=True)
class _Owner:
    """A process: its host, that host's boot, its process namespace, its number and when it began, in clock ticks."""

    host: str
    boot: str
    namespace: str
    pid: int
    began: int

    @classmethod
    def here(cls) -> _Owner:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")
        namespace, pid = str(Path("/proc/self/ns/pid").readlink()), os.getpid()
        return cls(_short(socket.gethostname()), _short(boot), _short(namespace), pid, _began(pid) or 0)

    @classmethod
    def parse(cls, text: str) -> _Owner:
        host, boot, namespace, pid, began = text.split("-")
        return cls(host, boot, namespace, int(pid), int(began))

    def is_dead(self, here: _Owner) -> bool:
        """For certain: a process of another host, or of another container, may be alive."""
        if self.host != here.host:
            return False
        if self.boot != here.boot:
            return True
        return self.namespace == here.namespace and _began(self.pid) != self.began

    def __str__(self) -> str:
        return f"{self.host}-{self.boot}-{self.namespace}-{self.pid}-{self.began}"


def claimed_folder(output: Path, key: str) -> Path:
    """An unfinished folder of this key that nobody owns any more, now this process's; else a new and empty one.

    Those of other keys that nobody owns are removed. Raises OSError.
    """
    here = _Owner.here()
    mine = _place(output, key, str(here))
    found = False
    for path in sorted(output.parent.glob(f"{_glob_escaped(_prefix(output))}*")):
        parsed = _NAME.fullmatch(path.name.removeprefix(_prefix(output)))
        if parsed is None or not (parsed["owner"] == _FREE or _Owner.parse(parsed["owner"]).is_dead(here)):
            continue
        if not found and parsed["key"] == _short_key(key):
            with suppress(FileNotFoundError):  # another process was quicker
                path.rename(mine)
                found = True
        else:
            shutil.rmtree(path, ignore_errors=True)
    if not found:
        mine.mkdir()
    return mine


def freed_folder(folder: Path, output: Path, key: str) -> None:
    """Leave a folder to whoever comes next. Raises OSError."""
    folder.rename(_place(output, key, _FREE))


def _place(output: Path, key: str, owner: str) -> Path:
    return output.with_name(f"{_prefix(output)}-{_short_key(key)}-{owner}-{secrets.token_hex(4)}")


def _prefix(output: Path) -> str:
    return f".{output.name[:40]}.partial"


def _glob_escaped(text: str) -> str:
    return re.sub(r"([*?[])", r"[\1]", text)


def _short_key(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()[:16]


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _began(pid: int) -> int | None:
    """When a process began; None if there is none of that number."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return int(stat.rpartition(")")[2].split()[19])
