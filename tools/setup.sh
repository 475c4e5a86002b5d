#!/usr/bin/env bash
# Sets up what the Makefile needs, in steps that it repeats only when their inputs changed: `tools/setup.sh env` makes the virtual
# environment with torch and the build tools, `install` the package (as a link to this directory) with its extras, `build` the
# native library, incrementally.
#
#   PYTHON=...   the Python to use (default: the first of python3, python3.13 ... python3.10 that is 3.10 to 3.13)
#   VENV=...     where the environment goes (default: .venv)
#   V2DROP_CUDA=AUTO|ON|OFF, V2DROP_CUDA_ARCHS="80 90"   what `build` builds for GPUs (default: for the one that is here, else for 90)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=${VENV:-.venv}
constraints=requirements/constraints.txt
torch_cpu=2.13.0
torch_range='torch>=2.10,<2.14'

fail() {
  echo "setup: $*" >&2
  exit 1
}
say() { echo "setup: $*" >&2; }

find_python() {
  local tried=() name
  for name in ${PYTHON:-python3 python3.13 python3.12 python3.11 python3.10}; do
    if command -v "$name" >/dev/null && "$name" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' 2>/dev/null; then
      command -v "$name"
      return
    fi
    tried+=("$name")
  done
  fail "no Python 3.10 to 3.13 was found (tried: ${tried[*]}); install one, or name it: make PYTHON=/path/to/python3"
}

# Says nothing unless it fails; then the end of its log tells why.
try_pip() {
  "$venv/bin/python" -m pip install --no-input --disable-pip-version-check --progress-bar off "$@" >"$venv/pip.log" 2>&1
}
pip_install() {
  try_pip "$@" && return
  tail -n 25 "$venv/pip.log" >&2
  fail "pip could not install: $*"
}
in_venv() { "$venv/bin/python" -c "$1" 2>/dev/null; }

torch_is_usable='
import importlib.metadata as m, torch
version = tuple(int(x) for x in m.version("torch").split("+")[0].split(".")[:2])
assert (2, 10) <= version < (2, 14)
'

make_env() {
  local python compiler system_site=()
  python=$(find_python)
  "$python" -c 'import venv, ensurepip' 2>/dev/null ||
    fail "$python cannot make virtual environments (no ensurepip). Debian: apt install python3-venv"
  "$python" -c 'import os, sys, sysconfig as s; sys.exit(not os.path.exists(s.get_path("include") + "/Python.h"))' ||
    fail "the C headers of $python are missing (Python.h). Debian: apt install python3-dev"
  compiler=${CXX:-c++}
  command -v "${compiler%% *}" >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null ||
    fail "no C++17 compiler was found. Debian: apt install g++"

  "$python" -c "$torch_is_usable" 2>/dev/null && system_site=(--system-site-packages)
  [[ ! -e $venv || -e $venv/.made-by-setup ]] ||
    fail "$venv is there and was not made by this script; move it away, or choose another place: make VENV=.venv-make ..."
  rm -rf "$venv"
  say "making $venv with $("$python" --version)"
  "$python" -m venv "${system_site[@]}" "$venv"
  touch "$venv/.made-by-setup"

  if [[ ${#system_site[@]} -gt 0 ]] && in_venv "$torch_is_usable"; then
    say "using the torch that is installed"
  elif command -v nvidia-smi >/dev/null && nvidia-smi >/dev/null 2>&1; then
    say "a GPU was found: installing $torch_range with CUDA"
    pip_install -c $constraints "$torch_range"
  elif [[ $(uname -sm) == "Linux x86_64" ]]; then
    # The plain Linux package would bring gigabytes of CUDA libraries along.
    local wanted="torch==$torch_cpu+cpu"
    say "no GPU was found: installing $wanted"
    if ! try_pip -c $constraints "$wanted"; then
      grep -q 'No matching distribution found for torch' "$venv/pip.log" || pip_install -c $constraints "$wanted"
      say "pip's own sources do not have it, trying PyTorch's; a torch 2.10 to 2.13 of your own for $python would be used as it is"
      pip_install -c $constraints "$wanted" --extra-index-url https://download.pytorch.org/whl/cpu
    fi
  else
    say "installing torch==$torch_cpu"
    pip_install -c $constraints "torch==$torch_cpu"
  fi

  # From here on nothing may replace that torch, nor the Triton that it came with.
  "$venv/bin/python" - >"$venv/pins.txt" <<'PY'
import importlib.metadata as metadata, platform, sys

print(f"torch=={metadata.version('torch')}")
try:
    print(f"triton=={metadata.version('triton')}")
except metadata.PackageNotFoundError:
    if sys.platform == "linux" and platform.machine() in ("x86_64", "aarch64"):
        print("triton==3.9.0" if sys.version_info >= (3, 11) else "triton==3.8.0")
PY
  # Their commands must lie in this environment, also where it sees the packages of the system.
  say "installing the tools"
  pip_install --ignore-installed -c $constraints -c "$venv/pins.txt" setuptools cmake ninja pybind11 ruff mypy clang-format
  in_venv "$torch_is_usable" || fail "torch cannot be imported: $("$venv/bin/python" -c 'import torch' 2>&1 | tail -n 1)"
}

install() {
  say "installing the package and its extras"
  V2DROP_NO_NATIVE=1 pip_install --no-build-isolation -c $constraints -c "$venv/pins.txt" -e '.[test,plot,bench,dev,docs,jax,models]'
}

build() {
  local log=$venv/build.log began=$SECONDS
  # One architecture is quick to build and, since it comes as PTX too, serves all later ones. `pip install .` builds for all.
  if [[ -z ${V2DROP_CUDA_ARCHS:-} ]]; then
    V2DROP_CUDA_ARCHS=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1 | tr -d .) || true
    [[ $V2DROP_CUDA_ARCHS =~ ^[0-9]+$ ]] || V2DROP_CUDA_ARCHS=90
    export V2DROP_CUDA_ARCHS
  fi
  say "building the native library"
  if ! PATH="$(cd "$venv/bin" && pwd):$PATH" "$venv/bin/python" setup.py -q build_ext --inplace >"$log" 2>&1; then
    cat "$log" >&2
    fail "the build failed"
  fi
  say "built in $((SECONDS - began)) s"
}

case ${1:-} in
  env) make_env ;;
  install) install ;;
  build) build ;;
  *) fail "usage: tools/setup.sh env|install|build" ;;
esac
