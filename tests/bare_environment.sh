#!/usr/bin/env bash
# The runtime with nothing but `mllama-deploy[cpu]`: it installs, it is alone, it answers, and it says what it lacks.
#   bare_environment.sh BUNDLE
set -euo pipefail
bundle=$(realpath "$1")
root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"${PYTHON:-python3}" -m venv "$work/venv"
bin=$work/venv/bin
"$bin/python" -m pip install -q -c "$root/constraints.txt" "$root[cpu]"
cd "$work"

"$bin/python" - <<'PYTHON'
import importlib.util, sys
for name in ("torch", "transformers", "onnx", "onnx_ir", "ml_dtypes", "scipy"):
    if importlib.util.find_spec(name):
        sys.exit(f"{name} is installed: this environment is not bare")
PYTHON
answer=$("$bin/mllama" generate "$bundle" --image "$root/recipes/miniature/pictures/$(ls "$root/recipes/miniature/pictures" | grep -m1 png)" \
    --prompt "How many shapes are there?" --json)
echo "$answer"
echo "$answer" | "$bin/python" -c 'import json, sys; assert json.load(sys.stdin)["text"].strip()'
"$bin/mllama" verify "$bundle"

set +e
message=$("$bin/mllama" export "$root/recipes/miniature/checkpoint" "$work/out" 2>&1)
code=$?
set -e
echo "$message"
[ "$code" = 4 ] && [[ "$message" == *'pip install "mllama-deploy[export]"'* ]]

"$bin/python" -m pip uninstall -q -y onnxruntime
set +e
message=$("$bin/mllama" generate "$bundle" --prompt "Hello" 2>&1)
code=$?
set -e
echo "$message"
[ "$code" = 4 ] && [[ "$message" == *'pip install "mllama-deploy[cpu]"'* ]]
echo "bare environment: passed"
