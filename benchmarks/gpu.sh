#!/usr/bin/env bash
# All that needs a GPU, in one run: see benchmarks/gpu.py.
#
#     bash benchmarks/gpu.sh --json gpu.json
set -eu
cd "$(dirname "$0")/.."
exec "${PYTHON:-python3}" -m benchmarks.gpu "$@"
