"""A cache bounded by how much its entries hold, which for plans of many segments is megabytes each."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Generic, TypeVar

Value = TypeVar("Value")

# Segments of all entries of a cache. A plan holds about 1 KB per segment: its table here and on a device, and its layouts.
MOST_SEGMENTS = 1 << 15


class BoundedCache(Generic[Value]):
    """What ``make`` returned for the arguments of the latest calls, as many as ``most`` units of ``weigh`` hold."""

    def __init__(self, make: Callable[..., Value], weigh: Callable[..., int], most: int = MOST_SEGMENTS) -> None:
        self._make, self._weigh, self._most = make, weigh, most
        self._held: OrderedDict[tuple[Any, ...], Value] = OrderedDict()
        self._weight = 0
        self._lock = threading.Lock()

    def __call__(self, *key: Any) -> Value:
        with self._lock:
            if key in self._held:
                self._held.move_to_end(key)
                return self._held[key]
        value = self._make(*key)
        weight = self._weigh(*key)
        if weight > self._most:
            return value
        with self._lock:
            if key not in self._held:
                self._held[key] = value
                self._weight += weight
            while self._weight > self._most:
                oldest, _ = self._held.popitem(last=False)
                self._weight -= self._weigh(*oldest)
        return value

    def cache_clear(self) -> None:
        """Forget all entries."""
        with self._lock:
            self._held.clear()
            self._weight = 0
