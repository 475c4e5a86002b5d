"""Dropping in Hugging Face models as they are: hooks that come and go with a ``with``; transformers is imported in functions.

Use ``with vk.models.TokenDropper(schedule)(model) as dropping: model.generate(...)``.
"""

from .dropper import Dropping, TokenDropper
from .ilvas import Ilvas, ilvas
from .policies import preset, presets
from .policies.twigvlm import twig_schedule
from .policy import Method, Policy, Stop
from .report import Kept, LayerReport, Report
from .voco import voco_mask

__all__ = [
    "Dropping",
    "Ilvas",
    "Kept",
    "LayerReport",
    "Method",
    "Policy",
    "Report",
    "Stop",
    "TokenDropper",
    "ilvas",
    "preset",
    "presets",
    "twig_schedule",
    "voco_mask",
]
