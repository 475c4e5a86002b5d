"""The public import path of :mod:`v2drop_kernels.interop.jax`: the ops for JAX arrays, without torch."""

import sys

from .interop import jax
from .interop.jax import *  # noqa: F403 (for type checkers)

sys.modules[__name__] = jax
