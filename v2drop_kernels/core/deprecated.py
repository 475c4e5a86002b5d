"""Old public names, which warn and work until the next release."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


def warn(old: str, new: str, *, stacklevel: int = 3) -> None:
    """Warn that ``old`` is now ``new``, at the caller of the deprecated function."""
    warnings.warn(f"{old} is deprecated and will be removed in 0.2.0: use {new}", DeprecationWarning, stacklevel=stacklevel)


def argument(old: str, new: str) -> Callable[[F], F]:
    """A decorator: the keyword ``old`` is passed on as ``new``."""

    def decorate(function: F) -> F:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if old in kwargs:
                if new in kwargs:
                    raise TypeError(f"{function.__name__}() got both {new} and {old}, its old name")
                warn(f"{function.__name__}({old}=)", f"{new}=")
                kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        return call  # type: ignore[return-value]

    return decorate


def attribute(owner: str, old: str, new: str) -> Any:
    """A property ``old`` that reads and writes the attribute ``new``."""

    def read(self: Any) -> Any:
        warn(f"{owner}.{old}", f"{owner}.{new}")
        return getattr(self, new)

    def write(self: Any, value: Any) -> None:
        warn(f"{owner}.{old}", f"{owner}.{new}")
        setattr(self, new, value)

    return property(read, write, doc=f"Deprecated: use ``{new}``.")


def method(owner: str, old: str, new: str) -> Any:
    """A method ``old`` that calls ``new``."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        warn(f"{owner}.{old}()", f"{owner}.{new}()")
        return getattr(self, new)(*args, **kwargs)

    call.__name__ = old
    call.__doc__ = f"Deprecated: use :meth:`{new}`."
    return call


def class_name(old: str, new: str, value: Any) -> Any:
    """``value`` under its old name, for a module's ``__getattr__``."""
    warn(f"v2drop_kernels.models.{old}", f"v2drop_kernels.models.{new}", stacklevel=4)
    return value
