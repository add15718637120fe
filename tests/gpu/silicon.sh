#!/usr/bin/env bash
# The stages of a session at a machine with a GPU, without network or installed packages of ours: silicon.sh STAGE...
#
# What `gpu.pack` made lies in PARTS; what is unpacked and filled stays in STORE for the next call. Results are lines of
# OUT/results.jsonl. A step that fails or takes too long is told, and the next one begins.
set -uo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
parts=${PARTS:-$root/.silicon} store=${STORE:-/tmp/silicon} python=${PYTHON:-python3} shm=${SHM:-/dev/shm}
export OUT=${OUT:-$root/out/silicon/results} PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
mkdir -p "$store" "$OUT"
cd "$root"

say() { echo "== $(date +%T) $*"; }
try() { # SECONDS COMMAND...
  local limit=$1 code=0
  shift
  say "$*"
  timeout -k 5 "$limit" "$@" || code=$?
  [ "$code" = 0 ] || say "exit $code: $*"
}
use_ort() { # ours, in the place of what is installed, once both its parts are there
  export PYTHONPATH="$root/runtime:$root/exporter:$root/tests"
  [ ! -e "$store/onnxruntime/capi/libonnxruntime_providers_cuda.so" ] || PYTHONPATH="$store:$PYTHONPATH"
}
probe() { # SECONDS WORK...
  local limit=$1
  shift
  try "$limit" "$python" -m gpu.probe "$@"
}
unpack() {
  local part folders=()
  for part in "$@"; do folders+=("$parts/$part"); done
  try 120 "$python" -m gpu.unpack "$store" "${folders[@]}"
  use_ort
}
home() { # GIGABYTES: where so much fits, in memory if it can
  local free
  free=$(df --output=avail -B 1G "$shm" 2>/dev/null | tail -n 1 || echo 0)
  if [ "${free:-0}" -gt "$1" ]; then echo "$shm/silicon"; else echo "$store"; fi
}
filled() { # SKELETON GIGABYTES: its place, in $bundle; only one is filled at a time
  rm -rf "$shm/silicon" "$store"/filled
  bundle=$(home "$2")/filled/$1
  mkdir -p "$(dirname "$bundle")"
  cp -r "$store/$1" "$bundle"
  try 60 "$python" -m gpu.fill "$bundle"
}

machine() {
  unpack "$@" &
  local unpacking=$!
  probe 60 facts
  probe 90 blas
  wait "$unpacking"
  try 120 "$python" -m pytest -q --noconftest -p no:cacheprovider -p no:xdist -m gpu tests/gpu/test_device.py
}
mini() { # PRECISION...
  local precision
  for precision in "$@"; do probe 45 mini "$store/mini" "$precision"; done
}
eight() {
  filled 8of40-fp16 9
  try 110 "$python" -m gpu.judge "$bundle" "$store/8of40-fp16.config.json"
  probe 150 load,memory,decode,sampler,ttft,vision,profile "$bundle" --cases quick
  probe 60 vision "$bundle" --cases quick --graph vision=vision --label "vision graph with a mask"
  probe 60 decode "$bundle" --cases quick --no-capture --label "not captured"
  probe 60 oom "$bundle"
  probe 60 ttft "$bundle" --cases quick --option sdpa_kernel=0 --label "default attention kernels"
}
eight_bf16() {
  filled 8of40-bf16 9
  probe 90 load,memory,decode,ttft "$bundle" --cases quick
  try 100 "$python" -m gpu.judge "$bundle" "$store/8of40-bf16.config.json"
}
full() { # PRECISION GIGABYTES [WORKS]
  filled "11b-$1" "$2"
  probe 150 "${3:-load,memory,decode,sampler,ttft,vision,profile}" "$bundle"
}

use_ort
for stage in "$@"; do
  say "stage $stage"
  case $stage in
  1) machine ort-a mini-a ;;
  2) unpack ort-b mini-b && probe 60 facts && mini fp16 bf16 int4 int8-weight fp8 int8 fp32 ;;
  3) unpack eight && eight ;;
  4) unpack full && full fp16 23 ;;
  5)
    unpack eight full
    full int4 9 load,memory,decode,ttft,profile
    full fp8 14 load,memory,decode,ttft
    eight_bf16
    full int8-weight 14 load,memory,decode
    ;;
  bf16) unpack eight && eight_bf16 ;;
  mini-*) mini "${stage#mini-}" ;;
  *) echo "silicon.sh: no such stage: $stage" >&2; exit 2 ;;
  esac
done
say "over"
