"""Whether this process uses the compiled kernels. Imports none of them."""

from __future__ import annotations

import torch
from torch import Tensor

_is_on = False


def is_compiled(x: Tensor) -> bool:
    """Whether the compiled kernels compute the steps between products of `x`: on a CPU, in float32, without gradients,
    and only if they were found to give the same bits as torch.
    """
    return _is_on and x.dtype is torch.float32 and x.is_cpu and not torch.is_grad_enabled()


def is_on() -> bool:
    return _is_on


def use(on: bool) -> None:
    """Switch the kernels on or off for this process (`antefix.model.compiled.check.enable`)."""
    global _is_on
    _is_on = on
