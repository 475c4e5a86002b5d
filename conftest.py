"""Without jax there is nothing to import in v2drop_kernels/jax.py."""

import importlib.util

collect_ignore = [] if importlib.util.find_spec("jax") else ["v2drop_kernels/jax.py"]
