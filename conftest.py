"""Which modules of the package are not collected for their doctests."""

import importlib.util

# Public import paths that stand for a module in another folder, where its examples are collected.
collect_ignore = ["v2drop_kernels/array.py", "v2drop_kernels/jax.py", "v2drop_kernels/positions.py"]
if importlib.util.find_spec("jax") is None:
    collect_ignore.append("v2drop_kernels/interop/jax.py")
