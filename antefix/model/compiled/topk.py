"""`TorchOps.indexer_topk`, with the steps after its products compiled."""

from __future__ import annotations

import collections.abc

import torch
from torch import Tensor

from antefix.model.compiled import attention_kernels as kernels
from antefix.model.numerics import linear


def best_entries(
    queries_TIC: Tensor,
    weights_TI: Tensor,
    segments: collections.abc.Sequence[Tensor],
    num_visible_T: Tensor,
    k: int,
    together: int,
) -> Tensor:
    """Each query's k best visible entries [T, k], ascending, then -1. segments: keys [E, C] in order; together they
    must hold all visible entries.  together: how many queries are scored at once.
    """
    num, heads, _ = queries_TIC.shape
    width = sum(segment.shape[0] for segment in segments)
    visible, weights = num_visible_T.contiguous(), weights_TI.contiguous()
    scores = queries_TIC.new_empty(min(together, num), width)
    picked = torch.empty((num, k), dtype=torch.long)
    for start in range(0, num, together):
        part = slice(start, min(start + together, num))
        count, offset = part.stop - start, 0
        for segment in segments:
            hits = linear(queries_TIC[part], segment).contiguous()
            kernels.score(
                scores.data_ptr(), hits.data_ptr(), weights[part].data_ptr(), count, heads, segment.shape[0], width,
                offset,
            )  # fmt: skip
            offset += segment.shape[0]
        kernels.choose(picked[part].data_ptr(), scores.data_ptr(), visible[part].data_ptr(), count, width, k)
    return picked
