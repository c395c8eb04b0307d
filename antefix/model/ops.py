"""The interface of the five operations that touch cached KV: torch implements it here, kernels elsewhere.

Apart from these five operations, the model computes each token independently of all other tokens. An implementation
reads and writes packed pool rows through the pool that it is given. Attention always uses values that are rounded as
stored KV is, so that a hit computes with the same values as a cold run.

Shapes:  T = tokens of one sequence's chunk, H = heads, C = head dim (entries) or indexer dim (keys), I = indexer heads,
         W = n_win, S = width of a compressor's rows, k = entries a query keeps, R = RoPE dims.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from antefix.layout import BlockLayout, Part
from antefix.model.attend import WindowLine, attend_segments, attend_selected
from antefix.model.compiled.switch import is_compiled
from antefix.model.compressor import Compressor, finish_entries, pool_disjoint, pool_overlapping
from antefix.model.indexer import index_scores, top_entries
from antefix.model.numerics import ROW_TILE, pad_rows
from antefix.model.pool import BlockPool
from antefix.model.quant import round_entries, round_queries

if TYPE_CHECKING:
    from antefix.model.step_runner import StepRunner

# Size of the scores of one product, queries * heads * keys: they fit a core's L2 cache (2^17 floats are 512 KiB).
SCORES = 1 << 17
# How many queries are scored at once, and the width to which keys are padded. A score's bits do not depend on the
# number of columns of the product, as long as it is a multiple of this width (`antefix.model.arithmetic` checks it).
SCORE_QUERIES = 32
KEY_TILE = 64
# How many HCA entries one product attends to; 128 entries are 16K tokens at V4's ratio.
HCA_SEGMENT = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Entries:
    """One part of a sequence's global KV: its pool, the part, and the ids (int64) of its blocks in order."""

    pool: BlockPool
    part: Part
    block_ids: Tensor

    def locate(self, entries: Tensor) -> tuple[Tensor, Tensor]:
        """Block ids and rows of entries, given by their index in the sequence."""
        per_block = self.part.num_rows
        return self.block_ids[torch.div(entries, per_block, rounding_mode="floor")], entries % per_block


class Ops(Protocol):
    """What a device implements. Each method handles one sequence.

    steps_together: whether sequences that run one token each use `steps` (or `step_runner`, if there is one), which
        runs all of them in one set of calls.
    """

    steps_together: bool
    step_runner: StepRunner | None

    def window_pack(self, entries_TC: Tensor, layout: BlockLayout) -> Tensor:
        """Window KV, rounded in the same way as stored window KV."""

    def compress_and_pack(
        self,
        compressor: Compressor,
        rows: Tensor,
        overlap: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        to: Entries,
        first: int,
    ) -> None:
        """Pool the rows [2, G, m, S] of closed groups into entries `first`, `first + 1`, ... of `to`.

        overlap: [2, m, C] Ca rows of the previous group (CSA).  cos, sin [G, R / 2] at the groups' first tokens.
        """

    def indexer_topk(self, q_TIC: Tensor, weights_TI: Tensor, keys: Entries, num_visible_T: Tensor, k: int) -> Tensor:
        """Each query's k best visible entries [T, k], ascending, then -1. Of entries with equal scores, those with the
        lowest index are chosen.
        """

    def sparse_attention(
        self, q_THC: Tensor, window: WindowLine, sinks_H: Tensor, entries: Entries, picked_Tk: Tensor
    ) -> Tensor:
        """Attention over the window and the picked entries: [T, H, C]."""

    def full_attention(
        self, q_THC: Tensor, window: WindowLine, sinks_H: Tensor, entries: Entries | None, num_visible_T: Tensor
    ) -> Tensor:
        """Attention over the window and every visible entry: [T, H, C]. entries: None in window-only layers, HCA's
        entries otherwise.
        """


class TorchOps:
    """The torch implementation. On a CPU a row's bits do not depend on other rows; on a CUDA GPU they may."""

    steps_together = True
    step_runner: StepRunner | None = None

    def window_pack(self, entries_TC: Tensor, layout: BlockLayout) -> Tensor:
        return round_entries(entries_TC, layout)

    def compress_and_pack(
        self,
        compressor: Compressor,
        rows: Tensor,
        overlap: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        to: Entries,
        first: int,
    ) -> None:
        if is_compiled(rows):
            from antefix.model.compiled.groups import close_line

            if close_line(compressor, rows, overlap, cos, sin, to, first):
                return
        pooled = pool_disjoint(rows) if overlap is None else pool_overlapping(rows, overlap)
        values = finish_entries(pooled, compressor.kv_norm, cos, sin)
        indices = torch.arange(first, first + len(values), device=values.device)
        to.pool.write(to.part, *to.locate(indices), values)

    def indexer_topk(self, q_TIC: Tensor, weights_TI: Tensor, keys: Entries, num_visible_T: Tensor, k: int) -> Tensor:
        queries = round_queries(q_TIC, keys.pool.layout)
        weights_TI = weights_TI.to(queries.dtype)
        num_entries = int(num_visible_T.max())
        if num_entries <= k:
            return top_entries(queries.new_empty(len(queries), num_entries), num_visible_T, k)
        if is_compiled(queries):
            from antefix.model.compiled.attention import best_entries

            return best_entries(queries, weights_TI, keys, num_visible_T, k)
        rows = min(SCORE_QUERIES, len(queries)) * queries.shape[1]
        # 16 rows and fewer cost the same: one tile of rows.
        columns = max(SCORES // max(rows, ROW_TILE) // KEY_TILE, 1) * KEY_TILE
        segments = torch.split(read_entries(keys, num_entries, KEY_TILE), columns)
        indices = torch.arange(sum(map(len, segments)), device=queries.device)
        picked = []
        for start in range(0, len(queries), SCORE_QUERIES):
            part = slice(start, start + SCORE_QUERIES)
            scores = torch.cat([index_scores(queries[part], weights_TI[part], segment) for segment in segments], dim=1)
            visible = num_visible_T[part]
            scores.masked_fill_(indices >= visible.unsqueeze(1), float("-inf"))
            picked.append(top_entries(scores, visible, k))
        return torch.cat(picked)

    def sparse_attention(
        self, q_THC: Tensor, window: WindowLine, sinks_H: Tensor, entries: Entries, picked_Tk: Tensor
    ) -> Tensor:
        queries, sinks = q_THC.to(window.values.dtype), sinks_H.to(window.values.dtype)
        if is_compiled(queries):
            from antefix.model.compiled.attention import attend

            return attend(queries, window, sinks, entries, picked_Tk=picked_Tk)
        outputs = []
        for tile in window.tiles():
            part = slice(*tile.rows)
            picked = picked_Tk[part]
            values = gather_entries(entries, picked.clamp(min=0))
            outputs.append(attend_selected(queries[part], tile, sinks, values, picked >= 0))
        return torch.cat(outputs).to(q_THC.dtype)

    def full_attention(
        self, q_THC: Tensor, window: WindowLine, sinks_H: Tensor, entries: Entries | None, num_visible_T: Tensor
    ) -> Tensor:
        queries, sinks = q_THC.to(window.values.dtype), sinks_H.to(window.values.dtype)
        if is_compiled(queries):
            from antefix.model.compiled.attention import attend

            return attend(queries, window, sinks, entries, num_visible_T=num_visible_T, segment=HCA_SEGMENT)
        segments: list[Tensor] = []
        if entries is not None:
            segments = _finite_segments(entries, int(num_visible_T.max()))
        outputs = []
        for tile in window.tiles():
            part = slice(*tile.rows)
            visible = num_visible_T[part]
            needed = -(-int(visible.max()) // HCA_SEGMENT) if segments else 0
            outputs.append(attend_segments(queries[part], tile, sinks, segments[:needed], visible))
        return torch.cat(outputs).to(q_THC.dtype)


def _finite_segments(entries: Entries, num_entries: int) -> list[Tensor]:
    """The entries in segments of HCA_SEGMENT, with zeros after the last entry: values there get weight 0, and 0 times
    NaN would be NaN.
    """
    if not num_entries:
        return []
    segments = list(torch.split(read_entries(entries, num_entries, HCA_SEGMENT), HCA_SEGMENT))
    if rest := num_entries % HCA_SEGMENT:
        segments[-1] = pad_rows(segments[-1][:rest], HCA_SEGMENT)
    return segments


def gather_entries(entries: Entries, indices: Tensor) -> Tensor:
    """Decoded entries, given by their index in the sequence: indices [...] to [..., C]."""
    decoded = entries.pool.decoded(entries.part)
    blocks, rows = entries.locate(indices)
    if not decoded.is_contiguous():
        return decoded[blocks, rows]
    flat = (blocks * decoded.shape[1] + rows).flatten()
    return decoded.view(-1, decoded.shape[2]).index_select(0, flat).view(*indices.shape, -1)


def read_entries(entries: Entries, num_entries: int, multiple: int) -> Tensor:
    """At least the first `num_entries` decoded entries, padded to a multiple of rows: [E, C].

    Rows from `num_entries` on mean nothing, and may belong to other sequences. The result is a view if the blocks are
    neighbours in the pool.
    """
    decoded = entries.pool.decoded(entries.part)
    per_block = decoded.shape[1]
    wanted = -(-num_entries // multiple) * multiple
    block_ids = entries.block_ids[: -(-num_entries // per_block)]
    first = int(block_ids[0]) if num_entries else 0
    if bool((block_ids == torch.arange(first, first + len(block_ids), device=block_ids.device)).all()):
        # The pool's rows after the sequence's rows serve as padding, if there are any.
        picked = decoded[first : first + -(-wanted // per_block)]
    else:
        picked = decoded[block_ids]
    flat = picked.reshape(-1, picked.shape[-1])[:wanted]
    return flat if len(flat) == wanted else pad_rows(flat, multiple)
