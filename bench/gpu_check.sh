#!/usr/bin/env bash
# Builds the native library for the GPU that is here, runs the GPU tests, measures everything, and leaves a report: see gpu_check.py.
#
#   bench/gpu_check.sh [--dry] [--tune] [MINUTES] [FOLDER]      (default: 8 minutes, bench/results/<device>)
#
# --tune: instead of the above, find launch sizes, designs and the faster backend by size, into FOLDER/tune: see gpu_tune.py.
# Offline, with the machine's own torch and Triton: nothing is installed. PYTHON=... names the Python that has them. What cannot be
# built (no nvcc, no CMake) is missing from the report, which says so. --dry: the same on the CPU, tiny, with the library that is there.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
began=$SECONDS
root=$PWD

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

build() { # says in one line what came of it
  local log=build/gpu-check.log arch
  mkdir -p build
  arch=${V2DROP_CUDA_ARCHS:-$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability(0))' 2>/dev/null)} || true
  [[ -n $arch ]] || { echo "not built: torch sees no GPU to build for"; return; }
  local configure=(-S . -B build/gpu-check -DV2DROP_BUILD_PYTHON=ON -DV2DROP_JAX=OFF "-DV2DROP_CUDA_ARCHS=$arch")
  configure+=("-DPython_EXECUTABLE=$(command -v "$python")" "-Dpybind11_DIR=$("$python" -m pybind11 --cmakedir 2>/dev/null)")
  command -v ninja >/dev/null && configure+=(-G Ninja)
  if cmake "${configure[@]}" >"$log" 2>&1 && cmake --build build/gpu-check --parallel >>"$log" 2>&1; then
    echo "for architecture $arch in $((SECONDS - began)) s: $(grep -m 1 -o 'v2drop: .*' "$log" || echo 'see build/gpu-check.log')"
  else
    echo "failed: $(grep -m 1 -i error "$log" || tail -n 1 "$log")"
  fi
}

program=gpu_check
arguments=()
for argument; do
  if [[ $argument == --tune ]]; then program=gpu_tune; else arguments+=("$argument"); fi
done
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
export XLA_PYTHON_CLIENT_PREALLOCATE=false # jax, where it is, takes no more than it needs
if [[ " $* " == *" --dry "* ]]; then
  export TRITON_INTERPRET=1 CUDA_VISIBLE_DEVICES=
else
  unset TRITON_INTERPRET V2DROP_BACKEND
  V2DROP_BUILD_NOTE=$(build)
  export V2DROP_BUILD_NOTE
  module=$(find "$root/build/gpu-check" -maxdepth 1 -name '_C*.so' 2>/dev/null | head -n 1) || true
  [[ -z $module ]] || export V2DROP_NATIVE_MODULE=$module
  echo "build: $V2DROP_BUILD_NOTE"
fi
exec "$python" "bench/$program.py" ${arguments[@]+"${arguments[@]}"} --spent "$((SECONDS - began))"
