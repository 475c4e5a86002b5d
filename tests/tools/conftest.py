"""Scripts, pages and demos, whose models and shapes are tiny: on one thread."""

from support.threads import one_thread  # noqa: F401
