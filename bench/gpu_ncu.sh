#!/usr/bin/env bash
# Nsight Compute on the three main kernels: bandwidth, L2 hit rate and registers into FOLDER/ncu.csv, see gpu_ncu.py.
#
#   bench/gpu_ncu.sh [--dry] [FOLDER]      (default: build/gpu-results/<device>)
#
# Uses the native library that `make gpu-check` built, where it did. Where ncu is missing, or the system keeps the counters from it,
# the program says so in one line and succeeds.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
if [[ " $* " == *" --dry "* ]]; then
  export TRITON_INTERPRET=1 CUDA_VISIBLE_DEVICES=
fi
if [[ -z ${V2DROP_NATIVE_MODULE:-} ]]; then
  module=$(find "$root/build/gpu-check" -maxdepth 1 -name '_C*.so' 2>/dev/null | head -n 1) || true
  [[ -z $module ]] || export V2DROP_NATIVE_MODULE=$module
fi
exec "${PYTHON:-python3}" "$root/bench/gpu_ncu.py" "$@"
