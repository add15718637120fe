"""The command `mllama`, as a step runs it: JSON in, or a failure with the command's own line."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from gpu.runner import FailError, SkipError

_MAIN = "from mllama_runtime.cli import main; main()"  # a folder of unpacked wheels has no scripts


def mllama(*arguments: object) -> dict[str, Any]:
    """What `mllama ... --json` prints; a verdict that is red is a result too.

    Raises:
        FailError: with the error that the command tells.
    """
    command = [sys.executable, "-c", _MAIN, *map(str, arguments), "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    try:
        found: dict[str, Any] = json.loads(done.stdout)
    except json.JSONDecodeError:
        raise FailError(f"mllama {arguments[0]}: exit code {done.returncode} and no result") from None
    if "error" in found:
        raise FailError(f"mllama {arguments[0]}: {found['error']['message']}")
    return found


def snapshot(bundle: Path, target: Path) -> Path:
    """A bundle of hard links, to build engines into and to delete with them; nothing writes into a bundle's files."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(bundle, target, copy_function=os.link)
    return target


def need_disk(folder: Path, num_bytes: float, what: str) -> None:
    """Raises SkipError, with the arithmetic, when the disk is too small."""
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise SkipError(f"the disk is too small: {what} take {num_bytes / 1e9:.0f} GB, {free / 1e9:.0f} GB are free")
