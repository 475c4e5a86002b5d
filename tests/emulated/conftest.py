"""The CUDA kernels, compiled for the CPU; a process has one native library, so this directory is a process of its own."""

from v2drop_kernels import _native

if not _native.available()[0] or _native.cuda_archs() != "emulated":
    raise RuntimeError("tests/emulated needs V2DROP_NATIVE_MODULE to name an emulated build: run `make test-emulated`")
