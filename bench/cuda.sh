#!/usr/bin/env bash
# Parity and step times on an NVIDIA GPU. Uses .venv where there is one, else the python3 at hand (it needs
# jax with CUDA, numpy, safetensors, ml_dtypes). Without a GPU it says so and exits with 2.
#   bench/cuda.sh [--json FILE] [--only PART ...] [--dry]
# --only: parts whose names begin so. --dry: all parts at tiny shapes on the CPU, to see that they run
set -euo pipefail
cd "$(dirname "$0")/.."
python=python3
[ -x .venv/bin/python ] && python=.venv/bin/python
export PYTHONPATH="$PWD" PYTHONUNBUFFERED=1
exec "$python" -m bench.cuda "$@"
