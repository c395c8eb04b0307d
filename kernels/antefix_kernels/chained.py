"""Kernels that start while the kernel before them ends: programmatic dependent launch, on Hopper and later.

Many kernels of a decode step take about as long to start as to run. A chained kernel is put onto the multiprocessors as
soon as all programs of the kernel before it have started. It waits in `follow` until that kernel has ended and its
writes can be seen, so no bit changes.

Every program of a chained kernel calls `follow` first. So a kernel that has passed `follow` knows that all kernels
before it have ended, not only the last one, and it may write to memory that any of them has read.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra import cuda

# Whether kernels are chained; a benchmark compares both.
ENABLED = True


@triton.jit
def follow(CHAINED: tl.constexpr):
    """Wait until the kernel before this one has ended, and let the kernel after this one start."""
    if CHAINED:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()


def options(tensor: torch.Tensor) -> dict[str, Any]:
    """The arguments of a launch on this tensor's device that chain it; none where kernels cannot be chained."""
    if ENABLED and tensor.is_cuda and _can_chain(tensor.device):
        return {"CHAINED": 1, "launch_pdl": True}
    return {}


@functools.cache
def _can_chain(device: torch.device) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(device)[0] >= 9
