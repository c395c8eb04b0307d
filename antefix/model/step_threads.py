"""How many of torch's threads a forward pass takes on a CPU: all of them, or one where its operations are small.

Threads part every operation and wait for each other at its end. A decode step is some thousand operations of a few
microseconds, and waking a thread takes longer than that: with two threads it took three times as long as with one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from antefix.model.numerics import ROW_TILE

if TYPE_CHECKING:
    from antefix.model.model import Model

# Multiply-adds of a product of hidden size by hidden size, from which on threads share it: some 3 ms on one core. Of
# antefix-tiny (192) 1,800 tokens reach that, of a hidden size of 2,048 a decode step does.
SHARED_WORK = 1 << 26


@contextlib.contextmanager
def step_threads(model: Model, num_tokens: int) -> Iterator[int]:
    """While this lasts, operations take the threads that pay for so many tokens. Gives how many there are in all.

    All of torch's on a card, and where nobody has found that bits do not depend on their number
    (`model.threads_are_free`).
    """
    threads = torch.get_num_threads()
    rows = -(-num_tokens // ROW_TILE) * ROW_TILE
    is_large = rows * model.config.hidden_size**2 >= SHARED_WORK
    if threads == 1 or is_large or not model.threads_are_free or model.device.type != "cpu":
        yield threads
        return
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)
