"""The runtime stands alone: without torch, transformers, onnx or the exporter it imports and answers."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import mllama_runtime
import pytest

FORBIDDEN = ("torch", "transformers", "onnx", "onnx_ir", "onnxscript", "ml_dtypes", "safetensors", "mllama_exporter")
SOURCES = sorted(Path(mllama_runtime.__file__).parent.rglob("*.py"))

ANSWER = """
import importlib.abc, sys

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {forbidden!r}:
            raise ImportError(f"the runtime asked for {{name}}")

sys.meta_path.insert(0, Refuse())
import numpy as np
from mllama_runtime import Engine, SamplingParams

with Engine.load(sys.argv[1], num_threads=1) as engine:
    picture = np.zeros((70, 50, 3), np.uint8)
    answer = engine.generate("What?", images=[picture], sampling=SamplingParams(max_new_tokens=2))
print(len(answer.token_ids), *[name for name in {forbidden!r} if name in sys.modules])
"""


def test_sources_import_nothing_heavy() -> None:
    assert len(SOURCES) > 20
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
            assert not {name.split(".")[0] for name in names} & {*FORBIDDEN}, path


def test_it_answers_where_heavy_packages_cannot_be_imported(bundle_of) -> None:
    script = ANSWER.format(forbidden=FORBIDDEN)
    result = subprocess.run([sys.executable, "-c", script, bundle_of()], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() in (["1"], ["2"])


def test_onnx_runtime_keeps_no_device_id_and_reports_nothing(bundle_of, tmp_path: Path) -> None:
    """Its telemetry would leave a device id and a database in the cache folder; CI variables would hide that."""
    unset = ("CI", "GITHUB_ACTIONS", "TF_BUILD", "ORT_DISABLE_TELEMETRY", "ORT_RUNNING_UNIT_TESTS", "XDG_CACHE_HOME")
    environment = {name: value for name, value in os.environ.items() if name not in unset} | {"HOME": str(tmp_path)}
    load = "import sys\nfrom mllama_runtime import Engine\nwith Engine.load(sys.argv[1]):\n    pass"
    subprocess.run([sys.executable, "-c", load, bundle_of()], env=environment, check=True)
    assert not list(tmp_path.rglob("*onnxruntime*"))


def test_onnx_runtime_is_imported_in_one_place() -> None:
    exporter = Path(mllama_runtime.__file__).parents[2] / "exporter" / "mllama_exporter"
    importing = {p.name for p in [*SOURCES, *exporter.rglob("*.py")] if "import onnxruntime" in p.read_text()}
    assert importing == {"private_ort.py"}


@pytest.mark.parametrize("statement", ["import mllama_runtime", "import mllama_runtime.cli"])
def test_importing_the_package_loads_no_back_end(statement: str) -> None:
    script = f"{statement}; import sys; print('onnxruntime' in sys.modules, 'numpy' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["False", "False"]
