"""How long one kind of wait usually takes, and from when on it is late."""

from __future__ import annotations

from typing import Final

# The share of the mean that the next wait replaces.
_SHARE: Final = 0.1


class UsualTime:
    """The mean of the last waits, in seconds."""

    def __init__(self, usual_s: float | None, *, factor: float, least_s: float, most_s: float) -> None:
        """usual_s: the mean before the first wait; None: the first wait is late only after `most_s`.  factor: a wait is
        late after this many times the mean, but not before `least_s` and at the latest after `most_s`.
        """
        self._mean_s = usual_s
        self._factor = factor
        self._least_s = least_s
        self._most_s = most_s

    @property
    def late_s(self) -> float:
        if self._mean_s is None:
            return self._most_s
        return min(max(self._least_s, self._factor * self._mean_s), self._most_s)

    def note(self, seconds: float) -> None:
        """A wait took so long."""
        if self._mean_s is None:
            self._mean_s = seconds
        self._mean_s += _SHARE * (seconds - self._mean_s)
