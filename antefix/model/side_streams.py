"""Work of a recorded step that runs next to other work of the same step, on a stream of its own.

Many kernels of a step of few sequences use a small part of a GPU. In a CUDA graph, kernels that do not depend on one
another run at the same time. The bits of a kernel do not depend on what runs next to it, so no bit changes. Outside of
recordings everything runs in order on one stream, because waiting between streams would cost the host more than it
saves.

Memory: a fork waits for the main stream, so memory that a side stream gave back is free when the next fork uses it.
What a side stream reads must be kept until `join`, because the main stream could get its memory otherwise.
"""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Any

import torch

# Whether recorded steps use side streams; a benchmark compares both.
ENABLED = True
# Side streams run chains of small kernels, which go before the programs of a large product.
_PRIORITY = -1


class Side:
    """`with side: ...` runs the block on side stream `number`, after what the current stream has been given so far.
    What comes after `join` on the current stream comes after the block. Does nothing outside of recordings.
    """

    def __init__(self, device: torch.device, number: int) -> None:
        self._main: Any = None
        self._stream: Any = None
        self._within: Any = None
        if ENABLED and is_recording(device):
            self._main, self._stream = torch.cuda.current_stream(device), _stream(device, number)
            self._stream.wait_stream(self._main)

    def __enter__(self) -> None:
        if self._stream is not None:
            self._within = torch.cuda.stream(self._stream)
            self._within.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._within is not None:
            self._within.__exit__(kind, error, trace)

    def join(self) -> None:
        """What comes now on the current stream comes after the block; that may be another side stream."""
        if self._stream is not None:
            torch.cuda.current_stream(self._main.device).wait_stream(self._stream)


def is_recording(device: torch.device) -> bool:
    """Whether what this thread launches now is recorded instead of run."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class _Streams(threading.local):
    """A thread's own side streams, because two threads may record at once."""

    def __init__(self) -> None:
        self.streams: dict[tuple[torch.device, int], Any] = {}


_streams = _Streams()


def _stream(device: torch.device, number: int) -> Any:
    found = _streams.streams.get((device, number))
    if found is None:
        found = _streams.streams[device, number] = torch.cuda.Stream(device, priority=_PRIORITY)
    return found
