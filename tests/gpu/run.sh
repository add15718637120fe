#!/usr/bin/env bash
# Everything that takes an NVIDIA GPU: tests, validation on the device, the bench. Results in OUT, resumable.
#
#   tests/gpu/run.sh [OUT]            every step that has no result yet; the table is OUT/table.md  [default: out/gpu]
#   tests/gpu/run.sh OUT STEP...      these steps, again if they have been run
#   tests/gpu/run.sh --list           the names of all steps
#
# A step takes at most nine minutes. What is missing (a TensorRT flavour, torch, memory, disk) is skipped with its reason.
# Without a GPU: exit 4.
#
# Python packages: those of `mllama-deploy[export,dev]`, and of the back ends to be tried: tensorrt-cu13,
# tensorrt-rtx-cu13, onnxruntime-gpu (in the place of onnxruntime), and cuda-bindings. A machine without a
# package registry gets them as wheels: on another one, `python -m pip download --only-binary=:all: --python-version 3.12
# --platform manylinux_2_28_x86_64 -d wheels PACKAGE...`; carry the folder over, split into parts where files are limited
# in size; there, `python -m pip install --no-index --no-deps --target site wheels/*.whl`, and PYTHONPATH=site.
# PYTHON chooses the interpreter.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
[ -n "${PYTHON:-}" ] || [ -x "$python" ] || python=python3
export PYTHONPATH="$root/tests:$root/runtime:$root/exporter${PYTHONPATH:+:$PYTHONPATH}"

if [ "${1:-}" != --list ] && ! "$python" -S -c '
import ctypes
driver, count = ctypes.CDLL("libcuda.so.1"), ctypes.c_int()
if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)) or not count.value:
    raise SystemExit(1)' 2>/dev/null; then
  echo "tests/gpu/run.sh: no NVIDIA GPU, or no driver for it: nothing was run" >&2
  exit 4
fi
[ $# -gt 0 ] || set -- "$root/out/gpu"
exec "$python" -m gpu.steps "$@"
