"""The public import path of :mod:`v2drop_kernels.core.positions`."""

import sys

from .core import positions
from .core.positions import *  # noqa: F403 (for type checkers)

sys.modules[__name__] = positions
