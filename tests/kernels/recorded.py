"""Stands in for CUDA graphs where there is no card: what a replay computes lands in the memory of what was recorded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from antefix.model import Model
from antefix.model.step_runner import StepRunner


def captured(
    _: StepRunner, __: Model, step: Callable[[], Any], *, is_warm: bool
) -> tuple[Callable[[], None], tuple[Any, Any]]:
    """In place of `StepRunner._captured`. A card runs a step once before it is recorded, unless it is warm; recording
    itself computes nothing."""
    del is_warm
    made = step()
    for each in made[1]:
        each.fill_(float("nan"))

    def replay() -> None:
        again, rows = step()
        # On a card what keeps the tokens reads the memory of what was recorded, too.
        vars(made[0]).update(vars(again))
        for into, each in zip(made[1], rows, strict=True):
            into.copy_(each)

    return replay, made
