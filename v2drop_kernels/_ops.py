"""The namespace of the torch ops: ``torch.ops.v2drop``.

Hugging Face's kernel-builder generates a module of this name and content, with a namespace of its own for every build, so that
several builds fit into one process; ``hub/stage.py`` therefore leaves this file out.
"""

from typing import Any

import torch

ops: Any = torch.ops.v2drop


def add_op_namespace_prefix(op_name: str) -> str:
    """The qualified name of an op."""
    return f"v2drop::{op_name}"
