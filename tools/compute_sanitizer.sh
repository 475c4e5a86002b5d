#!/usr/bin/env bash
# Runs the GPU tests of the CUDA C++ kernels under compute-sanitizer: memcheck, racecheck, synccheck. Needs an NVIDIA GPU.
#   tools/compute_sanitizer.sh [arguments of pytest]      e.g. -k drop_tokens
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${VENV:-.venv}/bin/python
fail() {
  echo "compute_sanitizer: $*" >&2
  exit 2
}
command -v compute-sanitizer >/dev/null || fail "compute-sanitizer was not found on PATH; it comes with the CUDA toolkit"
[[ -x $python ]] || fail "$python was not found: run make setup"
"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || fail "PyTorch sees no GPU"

# Each tensor gets an allocation of its own, or accesses past its end would fall into PyTorch's pool and pass.
export PYTORCH_NO_CUDA_MEMORY_CACHING=1
for tool in memcheck racecheck synccheck; do
  echo "== $tool"
  compute-sanitizer --tool "$tool" --target-processes all --kernel-name kernel_substring=v2drop --error-exitcode 1 \
    "$python" -m pytest -q -m gpu -k "cuda" tests "$@"
done
