"""Everything that depends on transformers: its models, arguments, masks, caches, attention modules and the CLIP vision tower.

The rest of ``models`` reaches a model through :class:`ModelAdapter` and the functions of these modules. A new model family is
added in ``model.py`` (its parts), ``spans.py`` (where its vision tokens lie) and, if it has a CLIP tower, ``tower.py``.
"""

from .model import ModelAdapter, adapter_of

__all__ = ["ModelAdapter", "adapter_of"]
