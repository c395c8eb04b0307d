"""Which implementation of the cache path runs: plain torch, or Triton kernels on a CUDA card."""

from __future__ import annotations

import importlib.util

import torch

from antefix.errors import InvalidRequest
from antefix.layout import BlockLayout, KVFormat
from antefix.model.ops import Ops, TorchOps
from antefix.model.pool import BlockPool

KERNELS = ("auto", "triton", "torch")


def uses_triton(kernels: str, layout: BlockLayout, device: str | torch.device) -> bool:
    """auto: Triton where there is a card, Triton itself and the FP8 record format.

    Raises:  InvalidRequest: an unknown choice, or triton where it cannot run.
    """
    if kernels not in KERNELS:
        raise InvalidRequest(f"kernels must be one of {KERNELS}, is {kernels!r}")
    missing = []
    if torch.device(device).type != "cuda":
        missing.append("a CUDA device")
    if importlib.util.find_spec("triton") is None:
        missing.append("the triton package")
    if layout.kv_format is not KVFormat.FP8:
        missing.append("the fp8 record format")
    if kernels == "triton" and missing:
        raise InvalidRequest(f"kernels=triton needs {', '.join(missing)}")
    return kernels != "torch" and not missing


def make_backend(
    kernels: str, layout: BlockLayout, num_blocks: int, device: str | torch.device
) -> tuple[BlockPool, Ops]:
    """A pool on `device` and the operations that go with it; `kernels` is auto, triton or torch."""
    if not uses_triton(kernels, layout, device):
        return BlockPool(layout, num_blocks, device), TorchOps()
    from antefix.model.card_pool import CardPool
    from antefix.model.triton_ops import TritonOps

    return CardPool(layout, num_blocks, device), TritonOps(layout)
