#!/usr/bin/env bash
# Runs `make gpu-check` to its end without a GPU: on the package versions of the GPU machine (requirements/gpu-machine.txt), in a copy of
# the tree without .git, with tiny shapes, Triton's interpreter and the CUDA C++ kernels on the CPU. The first call is cut by its time,
# the second goes on from its archive. Then gpu_verify.py reads that archive and fails where a group did not yield its rows.
#
#   bench/gpu_check_dry.sh        PYTHON=... chooses the Python (default: a Python 3.12, or python3 where there is none)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
root=$PWD
venv=$root/build/gpu-machine
torch=2.11.0
cpu_index=https://download.pytorch.org/whl/cpu

step() { printf 'gpu-check-dry: %s (%d s)\n' "$*" "$SECONDS"; }
fail() { echo "gpu-check-dry: $*" >&2; exit 1; }

find_python() {
  local name
  for name in "${PYTHON:-python3.12}" "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.12*/bin/python3.12; do
    if "$name" -c 'import ensurepip' 2>/dev/null; then
      command -v "$name"
      return
    fi
  done
  command -v python3
}

python=$(find_python)
version=$("$python" -c 'import platform; print(platform.python_version())')
[[ $version == 3.12.* ]] || step "no Python 3.12 was found, so this runs on Python $version, unlike the GPU machine"

wanted="$version torch $torch $(cksum <requirements/gpu-machine.txt)"
if [[ $(cat "$venv/.wanted" 2>/dev/null) != "$wanted" ]]; then
  step "making an environment with Python $version, torch $torch and requirements/gpu-machine.txt"
  rm -rf "$venv"
  "$python" -m venv "$venv"
  pip=("$venv/bin/python" -m pip install --no-input --disable-pip-version-check)
  # The build for CPUs is a tenth of the size; where no index has it, the build for GPUs with its CUDA libraries serves as well.
  from=("torch==$torch")
  if "${pip[@]}" --quiet --dry-run --no-deps "torch==$torch+cpu" >/dev/null 2>&1; then
    from=("torch==$torch+cpu")
  elif "${pip[@]}" --quiet --dry-run --no-deps --retries 0 --timeout 15 --index-url "$cpu_index" "torch==$torch+cpu" >/dev/null 2>&1; then
    from=("torch==$torch+cpu" --extra-index-url "$cpu_index")
  fi
  VENV=$venv tools/setup.sh run "gpu-check-dry: installing ${from[0]} and requirements/gpu-machine.txt" "$venv/pip.log" \
    "${pip[@]}" --progress-bar off -r requirements/gpu-machine.txt "${from[@]}" || fail "pip could not install the environment"
  echo "$wanted" >"$venv/.wanted"
fi

step "copying the tree without .git"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
V2DROP_COMMIT=${V2DROP_COMMIT:-$(git rev-parse --short=12 HEAD 2>/dev/null || echo 000000000000)}
export V2DROP_COMMIT
mkdir "$scratch/tree"
if [[ -e .git ]]; then # tracked files and those that are neither tracked nor ignored, as they are now
  git ls-files -z --cached --others --exclude-standard | { xargs -0 ls -1d 2>/dev/null || true; } |
    tar -cf - -T - | tar -xf - -C "$scratch/tree"
else
  tar -cf - --exclude=./build --exclude=./.venv . | tar -xf - -C "$scratch/tree"
fi
cd "$scratch/tree"
# `make commit-file` writes this in the tree that is copied; here, into the copy, so that the tree stays as it was.
"$venv/bin/python" bench/provenance.py
commit=$V2DROP_COMMIT
unset V2DROP_COMMIT V2DROP_BACKEND V2DROP_NATIVE_MODULE

check() {
  PYTHON=$venv/bin/python PATH=$venv/bin:$PATH bench/gpu_check.sh --dry --build emulate --out "$scratch/out" "$@" >>"$scratch/log" 2>&1 ||
    { tail -n 60 "$scratch/log" >&2; fail "a call of bench/gpu_check.sh ended with code 1"; }
}
step "first call, cut by its time"
check --results "$scratch/first/dry" --minutes 0.5
grep -q 'The time is over. Left for the next call' "$scratch/log" || fail "the first call was not cut"
step "second call, which goes on from the archive of the first"
check --results "$scratch/second/dry" --resume "$scratch/out/gpu-check.tar.gz" --minutes 20
step "checking what the archive holds"
PYTHONPATH=$PWD "$venv/bin/python" bench/gpu_verify.py "$scratch/out/gpu-check.tar.gz" "$commit"
step "done"
