"""Python environments of the oracles: packages that the project must not have, on top of the project's own.

An oracle is a script that runs in such an environment, in a process of its own, and talks in files. The environments
are kept under `out/oracles/` (ignored by git) and made again when their requirements change.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

from filelock import FileLock

_KEPT = Path(__file__).parents[2] / "out" / "oracles"


def environment(name: str, requirements: Path) -> Path:
    """The Python executable of an environment that has what `requirements` lists, and below it the project's packages.

    requirements: every package and version, dependencies included: pip resolves nothing. What it lists hides the
    project's own version. torch and whatever else it does not list are the project's. pip's output goes to stdout;
    where it fails, so does this (`subprocess.CalledProcessError`).
    """
    key = f"{requirements.read_text()}\n{sys.version}\n{sysconfig.get_path('purelib')}"
    folder = _KEPT / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    _KEPT.mkdir(parents=True, exist_ok=True)
    with FileLock(_KEPT / f"{folder.name}.lock"):
        if not folder.exists():
            unfinished = _KEPT / f"{folder.name}.unfinished"
            shutil.rmtree(unfinished, ignore_errors=True)
            venv.create(unfinished)
            python = _python(unfinished)
            pip = (sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check")
            options = ("--no-deps", "--no-compile", "--no-warn-script-location", "--quiet")
            subprocess.run([*pip, "install", *options, "--requirement", str(requirements)], check=True)
            project = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}  # searched after its own packages
            (_site_packages(unfinished) / "project.pth").write_text("\n".join(project))
            unfinished.rename(folder)
    return _python(folder)


def run(python: Path, script: Path, *arguments: str | Path) -> None:
    """Runs an oracle's script; what it prints is shown where it fails."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    command = [str(python), str(script), *map(str, arguments)]
    done = subprocess.run(command, env=own, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    assert done.returncode == 0, f"{script.name} failed:\n{done.stdout[-4000:]}"


def _python(folder: Path) -> Path:
    return folder / "bin" / "python"


def _site_packages(folder: Path) -> Path:
    return next((folder / "lib").glob("python*/site-packages"))
