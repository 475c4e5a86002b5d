#!/usr/bin/env bash
# Sets up what the Makefile needs, in three steps that `make` repeats only when their inputs changed: `tools/setup.sh env` makes the
# virtual environment with torch and the build tools, `install` installs the package (as a link to this directory) with its extras,
# and `build` builds the native library incrementally. Each part prints a line when it begins, a line every ten seconds that shows
# how far it is, and a line with its seconds when it has ended. The full output is in the files *.log of the environment.
#
#   PYTHON=...   the Python to use (default: the first of python3, python3.13 ... python3.10 that is 3.10 to 3.13)
#   VENV=...     where the environment goes (default: .venv)
#   V2DROP_CUDA=AUTO|ON|OFF, V2DROP_CUDA_ARCHS="80 90"   what `build` builds for GPUs (default: for the GPU of this machine, else for 90)
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

# timed TITLE LOG COMMAND...: runs the command with its output in LOG, and reports on it; returns its exit status.
timed() {
  local title=$1 log=$2 began=$SECONDS status=0
  shift 2
  say "$title ..."
  [[ $log == /dev/null ]] || touch "$log.began"
  : >"$log"
  while sleep 10 >/dev/null 2>&1; do say "  $((SECONDS - began)) s: $(progress "$log")"; done &
  reporter=$!
  "$@" >"$log" 2>&1 || status=$?
  stop_reporter
  ((status)) || say "$title: done in $((SECONDS - began)) s"
  return $status
}
# One line about the end of a log: the files compiled so far, the packages installed so far, or what pip does.
progress() {
  local compiled packages
  compiled=$(grep -oE '^\[[0-9]+/[0-9]+\]' "$1" | tail -n 1) || true
  packages=$(grep '^Installing collected packages:' "$1" | tail -n 1 | tr -cd ,) || true
  if [[ -n $compiled ]]; then
    echo "${compiled//[\[\]]/} files compiled or linked"
  elif [[ -n $packages ]]; then
    echo "$(find "$venv"/lib/python*/site-packages -maxdepth 1 -name '*.dist-info' -newer "$1.began" | wc -l) of" \
      "$((${#packages} + 1)) packages installed"
  else
    grep -E '^ *(Collecting|Downloading|Building|Preparing|Getting|Running|Using|--)' "$1" | tail -n 1 | sed 's/^ *//' | cut -c 1-100
  fi
}
reporter=
stop_reporter() {
  [[ -n $reporter ]] || return 0
  kill "$reporter" 2>/dev/null || true
  wait "$reporter" 2>/dev/null || true
  reporter=
}
trap stop_reporter EXIT

try_pip() {
  timed "$1" "$venv/pip.log" "$venv/bin/python" -m pip install --no-input --disable-pip-version-check --progress-bar off "${@:2}"
}
# pip_install TITLE ARGUMENTS...: a failure shows the end of pip's output.
pip_install() {
  try_pip "$@" && return
  tail -n 25 "$venv/pip.log" >&2
  fail "pip could not install: ${*:2}"
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
  timed "1 of 5: a virtual environment in $venv with $("$python" --version)" /dev/null \
    "$python" -m venv "${system_site[@]}" "$venv" || fail "$python could not make a virtual environment in $venv"
  touch "$venv/.made-by-setup"

  if [[ ${#system_site[@]} -gt 0 ]] && in_venv "$torch_is_usable"; then
    say "2 of 5: the installed torch $("$venv/bin/python" -c 'import torch; print(torch.__version__)') is reused"
  elif command -v nvidia-smi >/dev/null && nvidia-smi >/dev/null 2>&1; then
    pip_install "2 of 5: $torch_range with CUDA, since a GPU was found" -c $constraints "$torch_range"
  elif [[ $(uname -sm) == "Linux x86_64" ]]; then
    # The plain Linux package would install gigabytes of CUDA libraries too.
    local wanted="torch==$torch_cpu+cpu"
    if ! try_pip "2 of 5: $wanted, since no GPU was found" -c $constraints "$wanted"; then
      grep -q 'No matching distribution found for torch' "$venv/pip.log" ||
        { tail -n 25 "$venv/pip.log" >&2 && fail "pip could not install $wanted"; }
      say "the package index of pip does not have $wanted; a torch 2.10 to 2.13 that is installed for $python would be used instead"
      pip_install "2 of 5: $wanted from download.pytorch.org" -c $constraints "$wanted" \
        --extra-index-url https://download.pytorch.org/whl/cpu
    fi
  else
    pip_install "2 of 5: torch==$torch_cpu" -c $constraints "torch==$torch_cpu"
  fi

  # The later steps must not replace that torch, nor the Triton that it came with.
  "$venv/bin/python" - >"$venv/pins.txt" <<'PY'
import importlib.metadata as metadata, platform, sys

print(f"torch=={metadata.version('torch')}")
try:
    print(f"triton=={metadata.version('triton')}")
except metadata.PackageNotFoundError:
    if sys.platform == "linux" and platform.machine() in ("x86_64", "aarch64"):
        print("triton==3.9.0" if sys.version_info >= (3, 11) else "triton==3.8.0")
PY
  # --ignore-installed: their commands must be in this environment, also where it sees the packages of the system.
  pip_install "3 of 5: build tools, linters and type checker" --ignore-installed -c $constraints -c "$venv/pins.txt" \
    setuptools cmake ninja pybind11 ruff mypy clang-format
  in_venv "$torch_is_usable" || fail "torch cannot be imported: $("$venv/bin/python" -c 'import torch' 2>&1 | tail -n 1)"
}

install() {
  V2DROP_NO_NATIVE=1 pip_install "4 of 5: the package and its extras" --no-build-isolation -c $constraints -c "$venv/pins.txt" \
    -e '.[test,plot,bench,dev,docs,jax,models]'
}

build() {
  local log=$venv/build.log
  # One architecture is quick to build; its PTX serves all later ones. `pip install .` and `make wheel` build for all.
  if [[ -z ${V2DROP_CUDA_ARCHS:-} ]]; then
    V2DROP_CUDA_ARCHS=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1 | tr -d .) || true
    [[ $V2DROP_CUDA_ARCHS =~ ^[0-9]+$ ]] || V2DROP_CUDA_ARCHS=90
    export V2DROP_CUDA_ARCHS
  fi
  if ! PATH="$(cd "$venv/bin" && pwd):$PATH" timed "5 of 5: the native library" "$log" \
    "$venv/bin/python" setup.py -q build_ext --inplace; then
    cat "$log" >&2
    fail "the build failed"
  fi
}

case ${1:-} in
  env) make_env ;;
  install) install ;;
  build) build ;;
  run) timed "${@:2}" || { cat "$3" >&2 && fail "$2 failed"; } ;; # TITLE LOG COMMAND..., for the other builds of the Makefile
  *) fail "usage: tools/setup.sh env|install|build|run" ;;
esac
