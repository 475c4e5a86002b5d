# Every target sets up what it needs: a virtual environment in .venv, pinned packages, the native build, the package itself.
#   make demo [ARGS="photo.jpg --preset 128"]     make bench [ARGS=...]     make bench-c     make setup     make clean
#   make test     make test-full     make test-oldest     make test-main [ARGS="-k compact"]     make mutants     make sanitize     make fuzz     make lint     make format
#   make docs     make docs-serve     make wheel [PYTHONS="python3.10 python3.13"]     make gpu-check     make gpu-check-dry
# PYTHON=/path/to/python3 chooses the Python of a new environment, WORKERS=4 the number of test processes.

.DEFAULT_GOAL := help
SHELL := /bin/bash
VENV ?= .venv
BIN := $(VENV)/bin
export VENV PYTHON

CPP := $(shell find csrc examples bench/c tools -name '*.cpp' -o -name '*.h' -o -name '*.c' -o -name '*.cu' -o -name '*.cuh' 2>/dev/null)
NATIVE := CMakeLists.txt $(shell find cmake csrc tools/cuda_emulator -type f 2>/dev/null)
COMMA := ,
CMAKE := PATH="$(abspath $(BIN)):$$PATH" cmake
CTEST := PATH="$(abspath $(BIN)):$$PATH" ctest --output-on-failure --no-tests=error --progress --parallel 2
# Tests run in several processes, and one that has none left takes half of those of another; on a GPU, which they would share, in one.
WORKERS ?= $(shell nvidia-smi >/dev/null 2>&1 && echo 0 || { n=$$(nproc 2>/dev/null || echo 2); echo $$((n < 8 ? n : 8)); })
# Passive: threads that wait leave their core to the other processes.
PYTEST = OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal
# Whole files, in the order of conftest.py, where what a file makes for its tests takes longest: builds, dry runs, compiled sources.
BY_FILE = --dist loadfile --no-loadscope-reorder
MAIN := env -u TRITON_INTERPRET -u V2DROP_NATIVE_MODULE

.PHONY: help setup demo test test-full mutants test-native test-emulated test-interpreter test-compile-only test-main test-oldest sanitize fuzz gpu-check gpu-check-dry commit-file bench bench-c lint format docs docs-serve wheel clean

help:
	@sed -n 's/^# \{0,1\}//; 1,5p' Makefile

$(VENV)/.env: tools/setup.sh requirements/constraints.txt
	@tools/setup.sh env
	@touch $@

$(VENV)/.installed: $(VENV)/.env pyproject.toml setup.py
	@tools/setup.sh install
	@touch $@

# A change of Python files needs no step, since the package is installed as a link to this directory.
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

# Triton reads TRITON_INTERPRET once, when it is imported, and a process loads one native library, so that the interpreter, the
# emulated kernels and the compiler need processes of their own. The parts run one after another also with -j: their output stays
# readable, and the closing line of the main tests is the last one.
test: setup
	+@$(MAKE) --no-print-directory test-emulated
	+@$(MAKE) --no-print-directory test-interpreter
	+@$(MAKE) --no-print-directory test-compile-only
	+@$(MAKE) --no-print-directory test-main

# The families of models with the oldest transformers that is supported, which lies over the environment's own; `make test` has the newest.
OLDEST := 5.17.0
test-oldest: setup
	@$(BIN)/python -m pip install -q --no-deps --upgrade --target build/transformers-$(OLDEST) \
	  transformers==$(OLDEST) huggingface_hub==1.33.0 httpx httpcore
	@PYTHONPATH=build/transformers-$(OLDEST) $(MAIN) $(PYTEST) tests/models/test_families.py -m "not newest" $(ARGS)

# Every combination of parameters, where `make test` takes all pairs.
test-full:
	+@V2DROP_TEST_FULL=1 $(MAKE) --no-print-directory test

# Small errors are put into the sources one after another; the tests must find each of them.
mutants: setup
	$(BIN)/python tools/mutants.py $(ARGS)

# $(call build,DIR,OPTIONS): the C and C++ tests in a build of their own.
define build
	@mkdir -p $(1)
	@PATH="$(abspath $(BIN)):$$PATH" tools/setup.sh run "configure $(1)" $(1)/configure.log \
	  cmake -S . -B $(1) -G Ninja -DV2DROP_BUILD_TESTS=ON --log-level=WARNING $(2)
	@PATH="$(abspath $(BIN)):$$PATH" tools/setup.sh run "build $(1)" $(1)/build.log cmake --build $(1)
endef

# One build serves the C and C++ tests and the CUDA C++ kernels on the CPU: the same sources, compiled for an emulator of CUDA's threads.
test-native: setup
	@echo "== test 1 of 4: the C and C++ tests, and the CUDA C++ kernels on the CPU"
	$(call build,build/emulated,-DV2DROP_CUDA=EMULATE -DV2DROP_BUILD_PYTHON=ON -DV2DROP_JAX=OFF \
	  -DPython_EXECUTABLE=$(abspath $(BIN))/python -Dpybind11_DIR="$$($(BIN)/python -m pybind11 --cmakedir)")
	@$(CTEST) --test-dir build/emulated

test-emulated: test-native
	@V2DROP_NATIVE_MODULE="$$(ls $(abspath build/emulated)/_C*.so)" env -u TRITON_INTERPRET $(PYTEST) tests/ops tests/native tests/interop/test_array.py $(ARGS)

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

# Random calls against oracles, SECONDS for the public API and as many for the C interface under sanitizers; a SEED draws the same calls.
SECONDS ?= 60
SEED ?= 0
fuzz: setup
	$(BIN)/python tools/fuzz --seconds $(SECONDS) --seed $(SEED) $(ARGS)
	$(call build,build/asan,-DV2DROP_CUDA=EMULATE -DV2DROP_SANITIZE=address$(COMMA)undefined)
	$(BIN)/python tools/fuzz --seconds $(SECONDS) --seed $(SEED) --c-api "$$(find $(abspath build/asan) -name test_fuzz_cuda -type f)"

test-interpreter: setup
	@echo "== test 2 of 4: the Triton kernels in Triton's interpreter"
	@$(MAIN) TRITON_INTERPRET=1 $(PYTEST) tests/ops tests/native $(ARGS)

test-compile-only: setup
	@echo "== test 3 of 4: kernels compiled for GPUs that are not here"
	@$(MAIN) $(PYTEST) $(BY_FILE) tests/compile_only $(ARGS)

test-main: setup
	@echo "== test 4 of 4: the main tests"
	@$(MAIN) $(PYTEST) $(BY_FILE) --doctest-modules $(if $(filter tests/% v2drop_kernels/%,$(ARGS)),,tests v2drop_kernels) $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CPP)
	$(BIN)/python tools/mutants.py --list >/dev/null  # every mutant still fits the code

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

# The sdist and one wheel per Python, in dist/, and the test that installs the wheel of this environment's Python.
PYTHONS ?= $(BIN)/python
wheel: setup
	$(BIN)/python tools/make_wheels.py $(PYTHONS)
	V2DROP_WHEELS=dist $(BIN)/python -m pytest -q tests/tools/test_wheel.py

# The documentation: a warning or a broken link is an error. `docs-serve` shows it and follows changes of the files.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet --site-dir build/site

docs-serve: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks v2drop_demo.png
	rm -rf v2drop_kernels/_C*.so v2drop_kernels/_xla*.so v2drop_kernels/lib v2drop_kernels/include
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
