"""Whether a fault that is planted in products shows on this processor: decided by comparing bits, never by its name."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from antefix.model import Model
from antefix.model.arithmetic import steps_of
from antefix.model.probe_steps import numbers

Plant = Callable[[pytest.MonkeyPatch], None]
NUM_ROWS = 304
# First row and number of rows: single rows, parts of a tile, and whole tiles that threads divide evenly or not.
PLACES = (
    *((start, count) for start in (0, 21) for count in (1, 2, 3, 5, 8, 16, 17, 32, 48, 64, 80, 112, 128, 144, 160)),
    (0, NUM_ROWS),
)


def skip_if_harmless(plant: Plant, model: Model, *, threads: int = 1) -> None:
    """Skip the test if the fault makes no row of any product of `model` depend on its place or on the threads."""
    if not shows(plant, model, threads=threads):
        pytest.skip(
            "on this processor no row's bits depend on its place or on the threads with this fault: nothing to see"
        )


def shows(plant: Plant, model: Model, *, threads: int = 1) -> bool:
    """Whether with the fault, rows of a product of `model` differ from the same rows among others with one thread."""
    before = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        plant(patch)
        try:
            for number, step in enumerate(step for step in steps_of(model) if step.is_product):
                x = numbers((NUM_ROWS, *step.shape[1:]), number, step.dtype)
                torch.set_num_threads(1)
                whole = step.run(x, number)
                torch.set_num_threads(threads)
                for start, count in PLACES:
                    if not torch.equal(step.run(x[start : start + count], number), whole[start : start + count]):
                        return True
        finally:
            torch.set_num_threads(before)
    return False
