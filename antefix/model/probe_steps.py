"""The steps that the probe of a set-up's arithmetic runs over fixed inputs, each whole and in pieces."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor

ROWS: Final = 144
# First row and number of rows: single rows, less than a tile, across tiles, whole tiles, and 112 rows,
# which three threads divide unevenly.
ROW_CUTS: Final = ((0, 1), (5, 3), (3, 17), (21, 64), (64, 80), (29, 112))


@dataclass(frozen=True, slots=True)
class Step:
    """One computation of the model. run: maps the first dim of its input; rows must not affect each other.

    shape: the shape of the input. cuts: how the input is cut into pieces, whose results must equal those of the whole.
    note: what the probe does not cover of this computation.
    """

    label: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    cuts: tuple[tuple[int, int], ...]
    run: Callable[[Tensor, int], Tensor]
    is_product: bool = True
    note: str = ""


def function_step(name: str, function: Callable[[Tensor], Tensor], width: int, dtype: torch.dtype) -> Step:
    return Step(name, dtype, (ROWS, width), ROW_CUTS, lambda x, _: function(x), is_product=False)


def numbers(shape: tuple[int, ...], salt: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """Fixed numbers between -2 and 2 with full mantissas, made from integers: the same on every machine."""
    count = int(np.prod(shape))
    drawn = np.random.Generator(np.random.PCG64(salt)).integers(-(1 << 23), 1 << 23, count, dtype=np.int32)
    return (torch.from_numpy(drawn).view(shape).to(torch.float32) * 2.0**-22).to(device, dtype)
