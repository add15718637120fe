"""A command on a terminal of its own: what it writes is read as a person would see it, and keys are sent to it."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import sys
from types import TracebackType
from typing import Self

_SCRIPT = """
import fcntl, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # so that Ctrl-C is a signal
from mllama_runtime.cli import main
main()
"""


class Terminal:
    """`with Terminal("chat", bundle) as terminal:`; stdin, stdout and stderr are the terminal."""

    def __init__(self, *args: object) -> None:
        self._master, slave = pty.openpty()
        self._process = subprocess.Popen(
            [sys.executable, "-c", _SCRIPT, *map(str, args)],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            env={**os.environ, "TERM": "dumb"},
        )
        os.close(slave)
        self._unread = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._master)

    def send(self, keys: str) -> None:
        os.write(self._master, keys.encode())

    def until(self, text: str) -> str:
        """Everything up to and including `text`."""
        while text not in self._unread:
            if not self._read():
                raise AssertionError(f"the terminal ended without {text!r}: {self._unread!r}")
        seen, _, self._unread = self._unread.partition(text)
        return seen + text

    def end(self, key: str = "") -> tuple[str, int]:
        """Press a key; the rest, and the exit code.

        A Ctrl-C between the prompt and the read that waits for a line is noticed with the next key only (Python checks
        signals when its `select` is interrupted), so after some silence the key is pressed again, as a person would.
        """
        self.send(key)
        while True:
            if key and not select.select([self._master], [], [], 5)[0]:  # seconds
                self.send(key)
            elif not self._read():
                break
        return self._unread, self._process.wait(timeout=60)

    def _read(self) -> bool:
        if not select.select([self._master], [], [], 120)[0]:  # seconds; machines are shared
            raise AssertionError(f"nothing more came after {self._unread!r}")
        try:
            data = os.read(self._master, 65536)
        except OSError:  # EIO: the other side is closed
            return False
        self._unread += data.decode(errors="replace").replace("\r\n", "\n")
        return bool(data)
