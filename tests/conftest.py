"""What several test files share: the miniature, its bundles (exported once a run) and the reference model."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import get_args

import pytest
from filelock import FileLock

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the test processes share the cores; torch would take all of them

from mllama_runtime import Engine
from mllama_runtime.bundle import Bundle
from mllama_runtime.manifest import BasePrecision

MINIATURE = Path(__file__).parents[1] / "recipes" / "miniature" / "checkpoint"

BundleOf = Callable[..., Path]


@pytest.fixture(scope="session")
def miniature() -> Path:
    """The trained miniature's checkpoint folder."""
    return MINIATURE


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A folder that all processes of the run share."""
    root = tmp_path_factory.getbasetemp()
    return root if worker_id == "master" else root.parent


@pytest.fixture(scope="session")
def questions_of(shared: Path) -> Callable[[str, int], Path]:
    """`questions_of(split, count)`: a JSONL file of the miniature's questions, beside its pictures."""

    def write(split: str, count: int) -> Path:
        folder = shared / "questions" / f"{split}-{count}"
        folder.parent.mkdir(exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):
            if not (folder / "questions.jsonl").exists():
                script = MINIATURE.parent / "task.py"
                subprocess.run([sys.executable, script, folder, "--split", split, "--count", str(count)], check=True)
        return folder / "questions.jsonl"

    return write


@pytest.fixture(scope="session")
def bundle_of(shared: Path, questions_of: Callable[[str, int], Path]) -> BundleOf:
    """`bundle_of(precision, mask_semantics, vision, vision_states)`: the miniature's bundle; copy it to damage it.

    It is made once a run. Quantized precisions are made from the FP16 bundle; with `vision` its vision graph is
    quantized too.
    """

    def make(precision: str, mask_semantics: str, vision: str | None, vision_states: str, output: Path) -> None:
        from mllama_exporter.export import ExportOptions, bundle_from_checkpoint

        if precision in get_args(BasePrecision):
            options = ExportOptions(precision, mask_semantics, vision_states)  # type: ignore[arg-type]
            bundle_from_checkpoint(MINIATURE, output, options)
            return
        from mllama_exporter.quantize import QuantizeOptions, calibration_samples, quantized_bundle_from_bundle

        source = Bundle.open(bundle_of("fp16", mask_semantics))
        needs_data = precision != "int8-weight" or vision is not None
        samples = calibration_samples(questions_of("calibration", 128)) if needs_data else None
        quantized_bundle_from_bundle(source, output, QuantizeOptions(precision, vision), samples)  # type: ignore[arg-type]

    def bundle_of(
        precision: str = "fp32",
        mask_semantics: str = "hf",
        vision: str | None = None,
        vision_states: str = "published",
    ) -> Path:
        output = shared / "bundles" / "-".join(filter(None, (precision, mask_semantics, vision, vision_states)))
        output.parent.mkdir(exist_ok=True)
        with FileLock(output.with_suffix(".lock")):
            if not output.exists():
                make(precision, mask_semantics, vision, vision_states, output)
        return output

    return bundle_of


@pytest.fixture(scope="session")
def engine(bundle_of: BundleOf) -> Iterator[Engine]:
    """The miniature in FP32, open."""
    with Engine.load(bundle_of(), num_threads=1) as opened:
        yield opened
