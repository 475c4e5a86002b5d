"""Without jax there is nothing to import for JAX."""

import importlib.util

collect_ignore = [] if importlib.util.find_spec("jax") else ["v2drop_kernels/jax.py", "v2drop_kernels/interop/jax.py"]
