"""Which implementation of the cache path runs: plain torch, or Triton kernels on a CUDA GPU."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

import torch

from antefix.errors import ConfigError
from antefix.layout import BlockLayout, KVFormat, PartKind
from antefix.model.ops import Ops, TorchOps
from antefix.model.pool import BlockPool

if TYPE_CHECKING:
    from antefix.model.lead import Lead

KERNELS = ("auto", "triton", "torch")
# How the kernels run decode steps of one token per sequence: as recorded CUDA graphs (on one GPU only, or also over
# several), in launches that all sequences share, or sequence by sequence.
DECODE_STEPS = ("graphs", "graphs-over-ranks", "together", "alone")
# How short calls of several tokens per sequence run where steps share launches: in these launches, or one by one.
SHORT_PREFILLS = ("together", "alone")


def uses_triton(kernels: str, layout: BlockLayout, device: str | torch.device) -> bool:
    """Whether Triton kernels run. auto: they run if there is a GPU, Triton and the FP8 record format.

    Raises:  ConfigError: an unknown choice, or triton where it cannot run.
    """
    if kernels not in KERNELS:
        raise ConfigError(f"kernels must be one of {KERNELS}, is {kernels!r}")
    missing = []
    if torch.device(device).type != "cuda":
        missing.append("a CUDA device")
    if importlib.util.find_spec("triton") is None:
        missing.append("the triton package")
    if layout.kv_format is not KVFormat.FP8:
        missing.append("the fp8 record format")
    elif not _fits(layout):
        missing.append("records at addresses that Triton's loads can read")
    if kernels == "triton" and missing:
        raise ConfigError(f"kernels=triton needs {', '.join(missing)}")
    return kernels != "torch" and not missing


def make_backend(
    kernels: str,
    layout: BlockLayout,
    num_blocks: int,
    device: str | torch.device,
    *,
    reproducible: bool = False,
    lead: Lead | None = None,
    takes_payloads: bool = True,
    decode_steps: str = DECODE_STEPS[0],
    short_prefills: str = SHORT_PREFILLS[0],
) -> tuple[BlockPool, Ops]:
    """A block pool on `device`, and the operations that work on this pool. `kernels` is auto, triton or torch.

    decode_steps, short_prefills: one of DECODE_STEPS and one of SHORT_PREFILLS; both matter only where Triton runs.
    With several ranks, the value "graphs" means the same as "alone".

    reproducible: use kernels that give a query the same bits whatever else is computed. Torch on a CPU always computes
    reproducibly. lead: the model's lead, where the model runs over several ranks: each rank gets such a pool.
    takes_payloads: as in `BlockPool`.
    """
    if decode_steps not in DECODE_STEPS:
        raise ConfigError(f"decode_steps must be one of {DECODE_STEPS}, is {decode_steps!r}")
    if short_prefills not in SHORT_PREFILLS:
        raise ConfigError(f"short_prefills must be one of {SHORT_PREFILLS}, is {short_prefills!r}")
    # Exchanges between ranks have not been recorded on GPUs yet, so graphs over ranks must be asked for by name. All
    # ranks must run the same way.
    steps = "alone" if lead is not None and decode_steps == "graphs" else decode_steps
    pool, ops = _make_backend(kernels, layout, num_blocks, device, reproducible, takes_payloads, steps, short_prefills)
    if lead is not None:
        lead.add_pool(
            pool, kernels=kernels, reproducible=reproducible, decode_steps=steps, short_prefills=short_prefills
        )
    return pool, ops


def _make_backend(
    kernels: str,
    layout: BlockLayout,
    num_blocks: int,
    device: str | torch.device,
    reproducible: bool,
    takes_payloads: bool,
    steps: str,
    short_prefills: str,
) -> tuple[BlockPool, Ops]:
    if not uses_triton(kernels, layout, device):
        return BlockPool(layout, num_blocks, device, takes_payloads=takes_payloads), TorchOps()
    from antefix.model.card_pool import CardPool
    from antefix.model.triton_ops import TritonOps

    pool = CardPool(layout, num_blocks, device, takes_payloads=takes_payloads)
    return pool, TritonOps(
        layout,
        reproducible=reproducible,
        batched=steps != "alone",
        graphs=steps in ("graphs", "graphs-over-ranks"),
        over_ranks=steps == "graphs-over-ranks",
        chunks=short_prefills == "together",
    )


def _fits(layout: BlockLayout) -> bool:
    """Whether records lie at addresses that the kernels can read: entries hold BF16, so they must start at even
    addresses; keys of 128 dims are read in words of four bytes.
    """
    geometry = layout.geometry
    if geometry.nope_dim % 2 or not geometry.nope_dim or geometry.indexer_dim < 16:
        return False
    for part in layout.parts:
        unit = 2 if part.kind is not PartKind.INDEXER_KEYS else 4 if geometry.indexer_dim == 128 else 1
        if part.offset % unit or layout.block_bytes % unit:
            return False
    return True
