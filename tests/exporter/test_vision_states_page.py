"""docs/vision-states.md: its script tells right and affected installations apart."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from oracles import environments

PAGE = Path(__file__).parents[2] / "docs" / "vision-states.md"
OLDER = Path(environments.__file__).parent / "older_transformers" / "requirements.txt"


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(code.splitlines()) <= 20
    path = tmp_path_factory.mktemp("page") / "ask.py"
    path.write_text(code, encoding="utf-8")
    return path


def answer(python: Path, script: Path) -> str:
    return subprocess.run([python, script], capture_output=True, text=True, check=True).stdout


def test_todays_transformers_is_affected(script: Path) -> None:
    assert answer(Path(sys.executable), script).endswith(": affected: states after the block\n")


def test_the_last_before_the_change_is_right(script: Path) -> None:
    python = environments.environment("transformers-4.54.1", OLDER)
    assert answer(python, script) == "transformers 4.54.1: right\n"


def test_the_last_state_repeated_is_told_from_the_next(script: Path) -> None:
    """A double of 4.55, made from what is installed: the last block's state stands in the place of every other."""
    double = (
        "encoder = tower.transformer\n"
        "inputs = []\n"
        "encoder.register_forward_hook(lambda _, args, output: type(output)(output[0], (output[0],) * 4))\n"
        "for block in"
    )
    code = script.read_text(encoding="utf-8")
    assert code.count("for block in") == 1
    code = code.replace("for block in", double)
    path = script.with_name("double.py")
    path.write_text(code, encoding="utf-8")
    assert answer(Path(sys.executable), path).endswith(": affected\n")
