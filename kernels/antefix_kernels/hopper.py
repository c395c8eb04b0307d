"""What a GPU can do. The Gluon kernels (decode_attention_hopper, index_scores_hopper) run on an H100 or similar, in a
Triton that has Gluon.

On such a GPU the Gluon kernels are the default. ANTEFIX_GLUON=0 turns the Gluon kernels off; the plain Triton kernels
compute the same results, but for the last bits.
"""

from __future__ import annotations

import importlib.util
import os

import torch

_GLUON = os.environ.get("ANTEFIX_GLUON") != "0" and importlib.util.find_spec("triton.experimental.gluon") is not None


def available(x: torch.Tensor) -> bool:
    """Whether the kernels for Hopper run on x's device. The kernels contain Hopper's own instructions, so they need
    compute capability 9.0.
    """
    return _GLUON and x.is_cuda and torch.cuda.get_device_capability(x.device) == (9, 0)


def converts_to_fp8(x: torch.Tensor) -> bool:
    """Whether x's device has an instruction that rounds float32 to FP8 E4M3: compute capability 8.9 and newer."""
    return x.is_cuda and torch.version.hip is None and torch.cuda.get_device_capability(x.device) >= (8, 9)
