"""Marks what `make test-fast` skips: some cases of a parametrised test, and tests that compute for seconds."""

from collections.abc import Iterable
from typing import Any

import pytest


class SlowTest(UserWarning):
    """A test without the mark `slow` computed for seconds. `make test-fast` turns it into a failure."""


def slow_but(fast: Iterable[Any], cases: Iterable[Any]) -> list[Any]:
    """Marks the cases that are not in `fast` as slow.  Raises:  ValueError: `fast` has a value that is not a case."""
    fast, cases = list(fast), list(cases)
    if unknown := [case for case in fast if case not in cases]:
        raise ValueError(f"no such case: {unknown}")
    return [case if case in fast else pytest.param(*_values(case), marks=pytest.mark.slow) for case in cases]


def _values(case: Any) -> tuple[Any, ...]:
    return case if isinstance(case, tuple) else (case,)
