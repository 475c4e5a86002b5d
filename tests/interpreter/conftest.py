"""Triton in its interpreter; the variable must be set before Triton is imported, so this directory is a process of its
own."""

import os
import sys

if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
    raise RuntimeError("Triton was imported already, for real targets: run `pytest tests/interpreter` on its own")
os.environ["TRITON_INTERPRET"] = "1"
