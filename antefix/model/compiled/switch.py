"""Whether this process uses the compiled kernels, and where they find MKL's exponential. Imports none of them."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

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


@functools.cache
def exponential_address() -> int:
    """The address of MKL's `vmsExp`; 0 where torch was built without MKL."""
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib/libtorch_cpu.so"))
        return ctypes.cast(library.vmsExp, ctypes.c_void_p).value or 0
    except (OSError, AttributeError):
        return 0
