"""Compares two outcomes of one prompt: equal bits, or how large the difference is and where.

Errors are relative to the largest absolute value of the same kind in the cold run. Shapes: see `RunOutcome`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from antefix.layout import BlockLayout
from antefix.model import Sequence, WindowState
from antefix.model.quant import unpack
from antefix_prefill.worker.engine import Engine


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RunOutcome:
    """Everything that the run of a prompt leaves. logits: [V] float32 of the last token. rows: [blocks, block_bytes]
    uint8.
    """

    logits: npt.NDArray[np.float32]
    rows: Tensor
    window: WindowState

    @classmethod
    def of(cls, engine: Engine, sequence: Sequence, logits: npt.NDArray[np.float32]) -> RunOutcome:
        rows = engine.pool.rows[sequence.block_table].clone()
        return cls(logits=logits.copy(), rows=rows, window=sequence.window.clone())


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """identical: equal in every bit of logits, global KV and window state.  error: the largest relative error, and
    where.
    """

    identical: bool
    error: float = 0.0
    where: str = ""


IDENTICAL: Final = Difference(identical=True)


def compare(cold: RunOutcome, hit: RunOutcome) -> Difference:
    """How `hit` differs from `cold`. Outcomes of different lengths have the largest possible difference."""
    if cold.rows.shape != hit.rows.shape or cold.window.position != hit.window.position:
        return Difference(identical=False, error=float("inf"), where="length")
    layout = cold.window.layout
    found = [_largest(torch.from_numpy(cold.logits), torch.from_numpy(hit.logits), "logits")]
    if not torch.equal(cold.rows, hit.rows):
        found += _rows_differ(layout, cold.rows, hit.rows)
    if cold.window.to_bytes() != hit.window.to_bytes():
        found += _windows_differ(cold.window, hit.window)
    differing = [difference for difference in found if not difference.identical]
    return max(differing, key=lambda difference: difference.error, default=IDENTICAL)


def _largest(cold: Tensor, hit: Tensor, where: str) -> Difference:
    if torch.equal(cold, hit):
        return IDENTICAL
    # Equal values have no difference, even if infinite, as the gates before the first group are.
    delta = torch.nan_to_num(torch.where(cold == hit, 0.0, (cold - hit).abs()), nan=float("inf"), posinf=float("inf"))
    largest = torch.where(cold.isfinite(), cold.abs(), 0.0).max().clamp(min=1e-30)
    return Difference(identical=False, error=float(delta.max() / largest), where=where)


def _rows_differ(layout: BlockLayout, cold: Tensor, hit: Tensor) -> list[Difference]:
    # Bytes may differ where values are equal (the sign of a zero); that counts as a difference.
    found = [Difference(identical=False, where="global KV")]
    for part in layout.parts:
        span = slice(part.offset, part.offset + part.nbytes)
        shape = (len(cold), part.num_rows, part.record.nbytes)
        pair = [unpack(part.kind, rows[:, span].reshape(shape), layout) for rows in (cold, hit)]
        found.append(_largest(pair[0], pair[1], f"global KV, layer {part.layer}, {part.kind.value}"))
    return found


def _windows_differ(cold: WindowState, hit: WindowState) -> list[Difference]:
    found = [Difference(identical=False, where="window state")]
    found += [
        _largest(a, b, f"window, layer {layer}")
        for layer, (a, b) in enumerate(zip(cold.window, hit.window, strict=True))
    ]
    for label, ours, theirs in (("main", cold.main, hit.main), ("indexer", cold.indexer, hit.indexer)):
        for layer, state in ours.items():
            other, count = theirs[layer], cold.position % cold.layout.geometry.ratio(layer)
            found.append(_largest(state.tail[:, :count], other.tail[:, :count], f"{label} tail, layer {layer}"))
            if state.overlap is not None and other.overlap is not None:
                found.append(_largest(state.overlap, other.overlap, f"{label} overlap state, layer {layer}"))
    return found
