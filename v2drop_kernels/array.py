"""The public import path of :mod:`v2drop_kernels.interop.array`: the ops for NumPy, DLPack and CuPy arrays, without torch."""

import sys

from .interop import array
from .interop.array import *  # noqa: F403 (for type checkers)

sys.modules[__name__] = array
