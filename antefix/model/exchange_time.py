"""Measures which share of the time of a model's calls ranks spend in exchanges, including the time that ranks wait for
each other.

On a CPU every exchange is timed. A GPU works asynchronously, so on a GPU CUDA events are recorded around exchanges.
Only one of `SAMPLED` calls is measured, because recording events takes time. Both ways give the share.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Iterator
from typing import Final

import torch
from torch import Tensor

SAMPLED: Final = 16


class ExchangeTime:
    """Seconds spent in exchanges, and in the calls of the model that contain them. Belongs to these calls' thread.

    num_calls, num_exchanges: counts of all calls and exchanges, timed or not. sampled: on a GPU, one of this many
    calls is timed.
    """

    def __init__(self) -> None:
        self.exchange_s = 0.0
        self.call_s = 0.0
        self.num_calls = self.num_exchanges = 0
        self.sampled = SAMPLED
        self._is_sampled = False
        # For a GPU: which of the two sums to add to, and the events at the beginning and end of the time.
        self._pending: deque[tuple[bool, torch.cuda.Event, torch.cuda.Event]] = deque()

    @property
    def share(self) -> float:
        """Time in exchanges divided by time in calls; 0 if nothing was measured."""
        return self.exchange_s / self.call_s if self.call_s else 0.0

    @contextlib.contextmanager
    def call(self, device: torch.device) -> Iterator[None]:
        """Measure the time of one call of the model."""
        self.num_calls += 1
        if device.type != "cuda":
            self._is_sampled, started = True, time.perf_counter()
            yield
            self.call_s += time.perf_counter() - started
            return
        self.settle()
        self._is_sampled = (self.num_calls - 1) % self.sampled == 0
        with self._between_events(is_call=True):
            yield
        self._is_sampled = False

    @contextlib.contextmanager
    def of(self, x: Tensor) -> Iterator[None]:
        """Measure the time of one exchange of the tensor `x`."""
        self.num_exchanges += 1
        if x.device.type == "cuda":
            with self._between_events(is_call=False):
                yield
            return
        started = time.perf_counter()
        yield
        if self._is_sampled:
            self.exchange_s += time.perf_counter() - started

    @contextlib.contextmanager
    def _between_events(self, *, is_call: bool) -> Iterator[None]:
        if not self._is_sampled:
            yield
            return
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        yield
        end.record()
        self._pending.append((is_call, begin, end))

    def settle(self) -> None:
        """Add up the times between recorded events that the GPU has passed. Events pass in the order in which they
        were recorded; a call's event comes after those of its exchanges.
        """
        while self._pending and self._pending[0][2].query():
            is_call, begin, end = self._pending.popleft()
            seconds = begin.elapsed_time(end) / 1e3
            if is_call:
                self.call_s += seconds
            else:
                self.exchange_s += seconds
