# Every target sets up what it needs: a virtual environment in .venv, pinned packages, the native build, the package itself.
#   make demo [ARGS="photo.jpg --preset 128"]     make test     make bench [ARGS=...]
#   make lint     make format     make setup     make clean     make test-main [ARGS="-k compact"]
#   make sanitize gpu-check gpu-check-dry     make bench-c
# PYTHON=/path/to/python3 chooses the Python of a new environment.

.DEFAULT_GOAL := help
SHELL := /bin/bash
VENV ?= .venv
BIN := $(VENV)/bin
export VENV PYTHON

CPP := $(shell find csrc examples bench/c tools -name '*.cpp' -o -name '*.h' -o -name '*.c' -o -name '*.cu' -o -name '*.cuh' 2>/dev/null)
NATIVE := CMakeLists.txt $(shell find cmake csrc tools/cuda_emulator -type f 2>/dev/null)
COMMA := ,
CMAKE := PATH="$(abspath $(BIN)):$$PATH" cmake
CTEST := PATH="$(abspath $(BIN)):$$PATH" ctest --output-on-failure --no-tests=error

.PHONY: help setup demo test test-native test-emulated test-interpreter test-compile-only test-main sanitize gpu-check gpu-check-dry commit-file bench bench-c lint format docs docs-serve clean

help:
	@sed -n 's/^# \{0,1\}//; 1,5p' Makefile

$(VENV)/.env: tools/setup.sh requirements/constraints.txt
	@tools/setup.sh env
	@touch $@

$(VENV)/.installed: $(VENV)/.env pyproject.toml setup.py
	@tools/setup.sh install
	@touch $@

# Python files need no step of their own, since the package is installed as a link to this directory.
$(VENV)/.built: $(VENV)/.installed $(NATIVE)
	@tools/setup.sh build
	@touch $@

setup: $(VENV)/.built

demo: setup
	$(BIN)/python -m v2drop_kernels demo $(ARGS)

bench: setup
	$(BIN)/python -m v2drop_kernels bench $(ARGS)

# From C, against the library that `make setup` built.
bench-c: setup
	@$(CMAKE) -S bench/c -B build/bench-c -G Ninja --log-level=WARNING -DV2Drop_DIR="$$($(BIN)/python -m v2drop_kernels config --cmakedir)"
	@$(CMAKE) --build build/bench-c -- --quiet
	build/bench-c/bench_drop

# Triton reads TRITON_INTERPRET once, when it is imported, so the interpreter and the compiler need processes of their own.
# One after another, whatever -j says: the main tests come last, so that their closing line is the last one.
test: setup
	+$(MAKE) --no-print-directory test-native
	+$(MAKE) --no-print-directory test-emulated
	+$(MAKE) --no-print-directory test-interpreter
	+$(MAKE) --no-print-directory test-compile-only
	+$(MAKE) --no-print-directory test-main

# $(call build,DIR,OPTIONS): the C and C++ tests in a build of their own.
define build
	@$(CMAKE) -S . -B $(1) -G Ninja -DV2DROP_BUILD_TESTS=ON --log-level=WARNING $(2)
	@$(CMAKE) --build $(1) -- --quiet
endef

test-native: setup
	$(call build,build/ctest,-DV2DROP_CUDA=OFF)
	$(CTEST) --test-dir build/ctest

# The CUDA C++ kernels on the CPU: the same sources, compiled for an emulator of CUDA's threads.
test-emulated: setup
	$(call build,build/emulated,-DV2DROP_CUDA=EMULATE -DV2DROP_BUILD_PYTHON=ON -DV2DROP_JAX=OFF \
	  -DPython_EXECUTABLE=$(abspath $(BIN))/python -Dpybind11_DIR="$$($(BIN)/python -m pybind11 --cmakedir)")
	$(CTEST) --test-dir build/emulated
	V2DROP_NATIVE_MODULE="$$(ls $(abspath build/emulated)/_C*.so)" env -u TRITON_INTERPRET $(BIN)/python -m pytest -q tests/ops tests/native tests/interop/test_array.py $(ARGS)

# On a machine with a GPU and its own torch: test, measure and report, without network or the setup above. Call it again to go on.
#   make gpu-check ARGS="--minutes 9 --out DIR"
gpu-check:
	bench/gpu_check.sh $(ARGS)

# Run this before the tree is copied to such a machine without .git, so that every row of the results names its commit.
commit-file:
	python3 bench/provenance.py

# gpu-check without a GPU: the package versions of the GPU machine, tiny shapes, a copy of the tree without .git.
gpu-check-dry:
	bench/gpu_check_dry.sh

# die_after_fork=0: one test forks while threads are running, which the library allows and ThreadSanitizer refuses by default.
sanitize: setup
	$(call build,build/asan,-DV2DROP_CUDA=EMULATE -DV2DROP_SANITIZE=address$(COMMA)undefined)
	$(CTEST) --test-dir build/asan
	$(call build,build/tsan,-DV2DROP_CUDA=OFF -DV2DROP_SANITIZE=thread)
	TSAN_OPTIONS=die_after_fork=0 $(CTEST) --test-dir build/tsan

test-interpreter: setup
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -q tests/ops tests/native $(ARGS)

test-compile-only: setup
	env -u TRITON_INTERPRET $(BIN)/python -m pytest -q tests/compile_only $(ARGS)

test-main: setup
	env -u TRITON_INTERPRET $(BIN)/python -m pytest -q --doctest-modules tests v2drop_kernels $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CPP)

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

# The documentation: a warning or a broken link is an error. `docs-serve` shows it and follows changes of the files.
docs: setup
	$(BIN)/mkdocs build --strict --quiet --site-dir build/site

docs-serve: setup
	$(BIN)/mkdocs serve $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks v2drop_demo.png
	rm -rf v2drop_kernels/_C*.so v2drop_kernels/_xla*.so v2drop_kernels/lib v2drop_kernels/include
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
