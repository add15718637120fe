"""What several test files share: the miniature, its bundles (exported once a run) and the reference model."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from filelock import FileLock

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the test processes share the cores; torch would take all of them

from mllama_runtime import Engine

MINIATURE = Path(__file__).parents[1] / "recipes" / "miniature" / "checkpoint"

BundleOf = Callable[..., Path]


@pytest.fixture(scope="session")
def miniature() -> Path:
    """The trained miniature's checkpoint folder."""
    return MINIATURE


@pytest.fixture(scope="session")
def bundle_of(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> BundleOf:
    """`bundle_of(precision, mask_semantics)`: the miniature's bundle, shared by the run; copy it to damage it."""
    root = tmp_path_factory.getbasetemp()
    shared = root if worker_id == "master" else root.parent

    def export(precision: str = "fp32", mask_semantics: str = "hf") -> Path:
        from mllama_exporter.export import ExportOptions, bundle_from_checkpoint

        output = shared / "bundles" / f"{precision}-{mask_semantics}"
        output.parent.mkdir(exist_ok=True)
        with FileLock(output.with_suffix(".lock")):
            if not output.exists():
                options = ExportOptions(precision=precision, mask_semantics=mask_semantics)  # type: ignore[arg-type]
                bundle_from_checkpoint(MINIATURE, output, options)
        return output

    return export


@pytest.fixture(scope="session")
def engine(bundle_of: BundleOf) -> Iterator[Engine]:
    """The miniature in FP32, open."""
    with Engine.load(bundle_of(), num_threads=1) as opened:
        yield opened
