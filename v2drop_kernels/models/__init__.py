"""Dropping in Hugging Face models as they are: hooks that come and go with a ``with``; transformers is imported in functions.

Use ``with vk.models.TokenDropper(schedule)(model) as dropping: model.generate(...)``.
"""

from .dropper import Dropping, TokenDropper
from .report import Kept, LayerReport, Report

__all__ = ["Dropping", "Kept", "LayerReport", "Report", "TokenDropper"]
