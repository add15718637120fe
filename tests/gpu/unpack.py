"""Opens what `gpu.pack` made: `python -m gpu.unpack STORE PART...`; STORE/onnxruntime is whole when both its parts are.

Bundles come to lie in STORE too. Parts are opened side by side.
"""

from __future__ import annotations

import sys
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

_PROVIDER = "onnxruntime/capi/libonnxruntime_providers_cuda.so"


def unpack(part: Path, store: Path) -> None:
    with tarfile.open(part / f"{part.name}.tar.xz", "r:xz") as tar:
        tar.extractall(store, filter="data")


def join(store: Path) -> None:
    """The provider from its two halves, once both are there."""
    halves = [store / f"{_PROVIDER}.{index}" for index in range(2)]
    if not all(half.exists() for half in halves):
        return
    with halves[0].open("ab") as whole:
        whole.write(halves[1].read_bytes())
    halves[0].rename(store / _PROVIDER)
    halves[1].unlink()


def main() -> None:
    began, store = time.monotonic(), Path(sys.argv[1])
    store.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda name: unpack(Path(name), store), sys.argv[2:]))
    join(store)
    print(f"unpacked {' '.join(sys.argv[2:])} in {time.monotonic() - began:.1f} s", flush=True)


if __name__ == "__main__":
    main()
