#!/usr/bin/env bash
# The first ten minutes on a GPU: whether every fast path computes what the reference does, then
# tokens per second, model-FLOPs utilization, and GRPO beside TRL. Writes one JSON file.
#
#   benchmarks/gpu.sh [OUTPUT.json]           on a GPU, with the python of the environment
#   benchmarks/gpu.sh --tiny [OUTPUT.json]    the same on a CPU with tiny sizes, to try the script
#
# PYTHON=…       the interpreter of an environment with Trivium
# TRL_PYTHON=…   the interpreter of an environment with TRL (benchmarks/speed/trl-1.16.txt); without
#                it GRPO is measured alone
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
exec "${PYTHON:-python}" "$here/gpu/run.py" ${TRL_PYTHON:+--trl "$TRL_PYTHON"} "$@"
