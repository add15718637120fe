"""Where CUDA's libraries are looked for, with files of a name in the place of theirs."""

from __future__ import annotations

import _ctypes
import ctypes
import importlib.util
import shutil
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
from mllama_runtime.device.cuda_libraries import load_cuda_libraries
from mllama_runtime.errors import EnvironmentFault

NAMES = ("libcudart.so.13", "libcublasLt.so.13", "libcublas.so.13", "libcurand.so.10", "libcudnn.so.9")


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the packages `nvidia.*`, which holds nothing yet; the loader itself finds no library."""
    spec = ModuleSpec("nvidia", None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path / "nvidia")]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec if name == "nvidia" else None)
    load = ctypes.CDLL

    def loaded(library: str) -> object:
        if "/" in library:
            return load(library)
        raise OSError(f"{library}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", loaded)
    return tmp_path / "nvidia"


def put(packages: Path, name: str, package: str) -> None:
    target = packages / package / "lib" / name
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(_ctypes.__file__, target)


def test_libraries_of_packages_are_loaded(packages: Path) -> None:
    for name in NAMES:
        put(packages, name, "cudnn" if "cudnn" in name else "cu13")
    load_cuda_libraries()
    loaded = Path("/proc/self/maps").read_text(encoding="utf-8")
    assert all(str(packages / place) in loaded for place in ("cu13/lib/libcublas.so.13", "cudnn/lib/libcudnn.so.9"))


def test_all_that_are_missing_are_named(packages: Path) -> None:
    for name in NAMES[:3]:
        put(packages, name, "cu13")
    expected = r"CUDA 13 with cuDNN 9, found libcurand\.so\.10 \(.*cannot open.*\), libcudnn\.so\.9 \(.*\); run: pip"
    with pytest.raises(EnvironmentFault, match=expected) as caught:
        load_cuda_libraries()
    assert caught.value.exit_code == 4


def test_a_file_that_is_no_library_is_told_as_the_loader_does(packages: Path) -> None:
    for name in NAMES:
        put(packages, name, "cu13")
    (packages / "cu13" / "lib" / NAMES[-1]).write_bytes(b"truncated")
    with pytest.raises(EnvironmentFault, match=r"found libcudnn\.so\.9 \(.*file too short\)"):
        load_cuda_libraries()
