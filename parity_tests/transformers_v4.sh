#!/usr/bin/env bash
# Runs the tests of the bridge under transformers 4, in a virtual environment of its own, since the two versions cannot
# be installed side by side:
#
#     parity_tests/transformers_v4.sh [FOLDER]
#
# FOLDER keeps the environment (1.2 GB) for the next time; without one it is made anew and removed. PYTHON names the
# interpreter, python3 by default.
set -euo pipefail
cd "$(dirname "$0")/.."

if [ $# -gt 0 ]; then
    folder=$1
else
    folder=$(mktemp -d)
    trap 'rm -rf "$folder"' EXIT
fi

[ -x "$folder/bin/python" ] || "${PYTHON:-python3}" -m venv "$folder"
"$folder/bin/pip" install --quiet torch==2.13.0 transformers==4.57.6 jaxtyping xxhash beartype pytest pytest-xdist
"$folder/bin/python" -m pytest -n 0 -p no:cacheprovider parity_tests/spec/test_huggingface{,_import}.py
