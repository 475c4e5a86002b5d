"""The tests of the merges, run for the Triton backend on CPU tensors."""

# ruff: noqa: F403
from test_merge import *
