#!/usr/bin/env bash
# Nsight Compute on the three main kernels: bandwidth, L2 hit rate and registers into FOLDER/ncu.csv, see gpu_ncu.py.
#
#   bench/gpu_ncu.sh [--dry] [FOLDER]      (default: bench/results/<device>)
#
# Where ncu is missing, or the system keeps the counters from it, that one line is all: it is no failure.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
if [[ " $* " == *" --dry "* ]]; then
  export TRITON_INTERPRET=1 CUDA_VISIBLE_DEVICES=
fi
exec "${PYTHON:-python3}" "$root/bench/gpu_ncu.py" "$@"
