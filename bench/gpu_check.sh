#!/usr/bin/env bash
# Tests and measures on the GPU that is here, with the machine's own torch and Triton: nothing is installed, no network is used.
#
#   bench/gpu_check.sh [--minutes 9] [--out DIR] [--from STEP | --only STEP,...] [...]     see --help and gpu_check.py
#   bench/gpu_check.sh --tune ...          launch sizes, launch modes and the faster backend by size, see gpu_tune.py
#   bench/gpu_check.sh --dry --results DIR  the same on the CPU with tiny shapes, for tests
#
# Call it again to go on. Where the tree is copied to the GPU machine without .git, run `make commit-file` first, so that every row
# names its commit. PYTHON=... names the Python that has torch. What cannot be built (no nvcc, no CMake) is missing from the report,
# which says so.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
began=$SECONDS

python=${PYTHON:-}
if [[ -z $python ]]; then
  for name in .venv/bin/python python3 python; do
    if "$name" -c 'import torch' 2>/dev/null; then
      python=$name
      break
    fi
  done
fi
[[ -n $python ]] || { echo "gpu_check: no Python here has torch; name one: PYTHON=/path/to/python" >&2; exit 2; }

program=gpu_check
arguments=()
for argument; do
  if [[ $argument == --tune ]]; then program=gpu_tune; else arguments+=("$argument"); fi
done
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
export XLA_PYTHON_CLIENT_PREALLOCATE=false # jax, where it is installed, takes no more memory than it needs
if [[ " $* " == *" --dry "* ]]; then
  export TRITON_INTERPRET=1 CUDA_VISIBLE_DEVICES=
else
  unset TRITON_INTERPRET V2DROP_BACKEND
fi
exec "$python" "bench/$program.py" ${arguments[@]+"${arguments[@]}"} --spent "$((SECONDS - began))"
