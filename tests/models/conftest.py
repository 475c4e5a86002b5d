"""Whole models, on one thread."""

from support.threads import one_thread  # noqa: F401
