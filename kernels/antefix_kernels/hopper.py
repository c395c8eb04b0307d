"""Whether the Gluon kernels (decode_attention_hopper, index_scores_hopper) run here: on an H100 or similar, in a
Triton that has Gluon.

They are the default there. ANTEFIX_GLUON=0 turns them off: the plain Triton kernels compute the same.
"""

from __future__ import annotations

import importlib.util
import os

import torch

_GLUON = os.environ.get("ANTEFIX_GLUON") != "0" and importlib.util.find_spec("triton.experimental.gluon") is not None


def available(x: torch.Tensor) -> bool:
    """Whether they run where x lies. They name Hopper's own instructions, so no other compute capability takes them."""
    return _GLUON and x.is_cuda and torch.cuda.get_device_capability(x.device) == (9, 0)
