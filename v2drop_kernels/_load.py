"""Loads the compiled module ``_C``, without torch.

For developers, ``V2DROP_NATIVE_MODULE=/path/to/_C.*.so`` loads another build of it, which finds its own libv2drop.
"""

from __future__ import annotations

import functools
import importlib.machinery
import importlib.util
import os
import sys
from types import ModuleType


@functools.cache
def load_library() -> tuple[ModuleType | None, str]:
    """The module, or None and why there is none."""
    try:
        if path := os.environ.get("V2DROP_NATIVE_MODULE"):
            return _module_at(path), ""
        from . import _C  # type: ignore[attr-defined]
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) or "cannot import name" in str(error):
            return None, "not built: the package was installed without its C++ library (reinstall with a C++17 compiler)"
        return None, f"built, but it cannot be loaded: {error}"
    return _C, ""


def _module_at(path: str) -> ModuleType:
    name = f"{__package__}._C"
    loader = importlib.machinery.ExtensionFileLoader(name, path)
    spec = importlib.machinery.ModuleSpec(name, loader, origin=path)
    spec.has_location = True
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    sys.modules[name] = module
    return module
