"""Pauses between a chunk's layers, in which a worker may run other work on the same GPU or the same thread of a CPU.

A chunk of some thousand tokens keeps a GPU busy for up to a second, and one of some hundred a CPU for a tenth of a
second. A decode step that came meanwhile would wait for the whole chunk. With pauses it waits for one layer. What runs
in a pause must not touch the chunk's sequences; then no bit changes, because a layer's inputs are tensors of the call
alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar

import torch

# What a chunk of the present thread calls between two layers.
_pause: ContextVar[Callable[[], bool] | None] = ContextVar("antefix_pause", default=None)


@contextlib.contextmanager
def with_pauses(pause: Callable[[], bool] | None) -> Iterator[None]:
    """Chunks that this thread runs in this context call `pause` between their layers.

    pause: returns whether the chunk is to wait after each layer until the GPU has computed it. Work of the next pause
        can then begin at once.
    """
    token = _pause.set(pause)
    try:
        yield
    finally:
        _pause.reset(token)


def layers_pause(device: torch.device) -> Callable[[], None] | None:
    """What a call of the model must do after each layer; None: nothing."""
    pause = _pause.get()
    if pause is None:
        return None
    waits = False
    before: torch.cuda.Event | None = None

    def after_layer() -> None:
        nonlocal waits, before
        if device.type == "cuda":
            event = torch.cuda.Event()
            event.record()
            if waits:
                event.synchronize()
            elif before is not None:
                # The host stays one layer ahead, so that the GPU always has something to do.
                before.synchronize()
            before = event
        # The other work gets the mode in which it would run outside of a call of the model.
        with torch.inference_mode(False):
            waits = pause()

    return after_layer
