"""Names that come from callers and are used as label values: the most used names are shown by name, all others together
as one. Pure.

Each value of a label is a separate series in every scraper, so the number of values is limited. Which names are shown
changes slowly: a name takes another's place when it was used twice as often lately. When a name loses its place, its
series ends, and its later uses count as others; sums over increases stay right.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

OTHERS: Final = "(others)"
# After so long what was used counts half.
_HALF_LIFE_S: Final = 600.0
# Names that are not shown and may come to be: so many for each place.
_WAITING_PER_PLACE: Final = 8


class TopNames:
    """on_drop: called with each name that lost its place."""

    def __init__(
        self, num_max: int, on_drop: Callable[[str], None], *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._num_max = num_max
        self._on_drop = on_drop
        self._clock = clock
        self._halved_s = clock()
        self._shown: dict[str, float] = {}
        self._waiting: dict[str, float] = {}

    def place(self, name: str, weight: float) -> str:
        """The label value under which a use of `name` is counted: the name itself, or OTHERS."""
        self._fade()
        if name in self._shown:
            self._shown[name] += weight
            return name
        if len(self._shown) < self._num_max:
            self._shown[name] = weight
            return name
        used = self._waiting.get(name, 0.0) + weight
        least = min(self._shown, key=lambda each: self._shown[each])
        if used > 2 * self._shown[least]:
            del self._shown[least]
            self._waiting.pop(name, None)
            self._shown[name] = used
            self._on_drop(least)
            return name
        self._wait(name, used)
        return OTHERS

    def _wait(self, name: str, used: float) -> None:
        self._waiting[name] = used
        if len(self._waiting) > _WAITING_PER_PLACE * self._num_max:
            del self._waiting[min(self._waiting, key=lambda each: self._waiting[each])]

    def _fade(self) -> None:
        now_s = self._clock()
        halvings = int((now_s - self._halved_s) / _HALF_LIFE_S)
        if halvings:
            self._halved_s += halvings * _HALF_LIFE_S
            for names in (self._shown, self._waiting):
                for name in names:
                    names[name] /= 2.0**halvings
