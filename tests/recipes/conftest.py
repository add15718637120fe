"""The miniature's pictures, as a module; the recipe's files are no package."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

PICTURES = Path(__file__).parents[2] / "recipes" / "miniature" / "pictures.py"


@pytest.fixture(scope="module")
def pictures() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("miniature_pictures", PICTURES)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up while it is executed
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]
