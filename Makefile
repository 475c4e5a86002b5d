# Every target sets up what it needs: a virtual environment in .venv, pinned packages, the native build, the package itself.
#   make demo [ARGS="photo.jpg --preset 128"]     make test     make bench [ARGS=...]
#   make lint     make format     make setup     make clean     make test-main [ARGS="-k compact"]
# PYTHON=/path/to/python3 chooses the Python of a new environment.

.DEFAULT_GOAL := help
SHELL := /bin/bash
VENV ?= .venv
BIN := $(VENV)/bin
export VENV PYTHON

CPP := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.c' -o -name '*.cu' -o -name '*.cuh' 2>/dev/null)
NATIVE := CMakeLists.txt $(shell find csrc -type f 2>/dev/null)

.PHONY: help setup demo test test-native test-interpreter test-compile-only test-main bench lint format clean

help:
	@sed -n 's/^# \{0,1\}//; 1,4p' Makefile

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

# Triton reads TRITON_INTERPRET once, when it is imported, so the interpreter and the compiler need processes of their own.
# One after another, whatever -j says: the main tests come last, so that their closing line is the last one.
test: setup
	+$(MAKE) --no-print-directory test-native
	+$(MAKE) --no-print-directory test-interpreter
	+$(MAKE) --no-print-directory test-compile-only
	+$(MAKE) --no-print-directory test-main

test-native: setup
	@PATH="$(abspath $(BIN)):$$PATH" cmake -S . -B build/ctest -G Ninja -DV2DROP_BUILD_TESTS=ON --log-level=WARNING
	@PATH="$(abspath $(BIN)):$$PATH" cmake --build build/ctest -- --quiet
	PATH="$(abspath $(BIN)):$$PATH" ctest --test-dir build/ctest --output-on-failure --no-tests=error

test-interpreter: setup
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -q tests/interpreter $(ARGS)

test-compile-only: setup
	env -u TRITON_INTERPRET $(BIN)/python -m pytest -q tests/compile_only $(ARGS)

test-main: setup
	env -u TRITON_INTERPRET $(BIN)/python -m pytest -q --doctest-modules tests v2drop_kernels $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CPP)

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks v2drop_demo.png
	rm -rf v2drop_kernels/_C*.so v2drop_kernels/lib v2drop_kernels/include
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
