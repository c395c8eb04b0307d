"""The five steps that touch cached KV, as one seam: torch here, other devices bring their own.

Everything outside is per-token arithmetic. An implementation reads and writes packed pool rows through the pool it is
given; attention always sees rounded values (what is read equals what is stored).

Shapes:  T = tokens of one sequence's chunk, H = heads, C = head dim (entries) or indexer dim (keys), I = indexer heads,
         W = n_win, S = width of a compressor's rows, k = entries a query keeps, R = RoPE dims.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from antefix.layout import BlockLayout, Part
from antefix.model.attend import Tile, attend_segments, attend_selected
from antefix.model.compressor import Compressor, finish_entries, pool_disjoint, pool_overlapping
from antefix.model.indexer import index_scores, top_entries
from antefix.model.pool import BlockPool
from antefix.model.quant import round_entries, round_queries

# Indexer keys scored by one product. Fixed, since a product's bits may depend on its number of columns.
KEY_SEGMENT = 512
# Queries scored at once: keeps [queries * heads, KEY_SEGMENT] floats within a core's L2 cache (measured).
SCORE_QUERIES = 32
# HCA entries attended to by one product; 128 entries are 16K tokens at V4's ratio.
HCA_SEGMENT = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Entries:
    """One part of a sequence's global KV: which pool, which part, which blocks in order (int64 ids)."""

    pool: BlockPool
    part: Part
    block_ids: Tensor

    def locate(self, entries: Tensor) -> tuple[Tensor, Tensor]:
        """Block id and row of entries by their index in the sequence."""
        per_block = self.part.num_rows
        return self.block_ids[torch.div(entries, per_block, rounding_mode="floor")], entries % per_block


class Ops(Protocol):
    """What a device implements. All of it is per sequence."""

    def window_pack(self, entries_TC: Tensor, layout: BlockLayout) -> Tensor:
        """Window KV rounded as it is stored."""

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
        """Pool closed groups' rows [2, G, m, S] into entries `first`, `first + 1`, ... of `to`.

        overlap: [2, m, C] Ca rows of the group before (CSA).  cos, sin [G, R / 2] at the groups' first tokens.
        """

    def indexer_topk(self, q_TIC: Tensor, weights_TI: Tensor, keys: Entries, num_visible_T: Tensor, k: int) -> Tensor:
        """Each query's k best visible entries [T, k], ascending, then -1. Ties go to the lowest index."""

    def sparse_attention(
        self, q_THC: Tensor, tiles: list[Tile], sinks_H: Tensor, entries: Entries, picked_Tk: Tensor
    ) -> Tensor:
        """Attention over the window and the picked entries: [T, H, C]."""

    def full_attention(
        self, q_THC: Tensor, tiles: list[Tile], sinks_H: Tensor, entries: Entries | None, num_visible_T: Tensor
    ) -> Tensor:
        """Attention over the window and every visible entry (HCA; None: window only): [T, H, C]."""


class TorchOps:
    """The torch implementation: CPU with row-invariant bits, CUDA without that promise."""

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
        pooled = pool_disjoint(rows) if overlap is None else pool_overlapping(rows, overlap)
        values = finish_entries(pooled, compressor.kv_norm, cos, sin)
        indices = torch.arange(first, first + len(values), device=values.device)
        to.pool.write(to.part, *to.locate(indices), values)

    def indexer_topk(self, q_TIC: Tensor, weights_TI: Tensor, keys: Entries, num_visible_T: Tensor, k: int) -> Tensor:
        queries = round_queries(q_TIC, keys.pool.layout)
        num_entries = int(num_visible_T.max())
        if num_entries <= k:
            return top_entries(queries.new_empty(len(queries), num_entries), num_visible_T, k)
        segments = read_segments(keys, num_entries, KEY_SEGMENT)
        indices = torch.arange(len(segments) * KEY_SEGMENT, device=queries.device)
        picked = []
        for start in range(0, len(queries), SCORE_QUERIES):
            part = slice(start, start + SCORE_QUERIES)
            scores = torch.cat([index_scores(queries[part], weights_TI[part], segment) for segment in segments], dim=1)
            visible = num_visible_T[part]
            scores.masked_fill_(indices >= visible.unsqueeze(1), float("-inf"))
            picked.append(top_entries(scores, visible, k))
        return torch.cat(picked)

    def sparse_attention(
        self, q_THC: Tensor, tiles: list[Tile], sinks_H: Tensor, entries: Entries, picked_Tk: Tensor
    ) -> Tensor:
        decoded = entries.pool.decoded(entries.part)
        outputs = []
        for tile in tiles:
            part = slice(*tile.rows)
            live = picked_Tk[part] >= 0
            blocks, rows = entries.locate(picked_Tk[part].clamp(min=0))
            outputs.append(attend_selected(q_THC[part], tile, sinks_H, decoded[blocks, rows], live))
        return torch.cat(outputs)

    def full_attention(
        self, q_THC: Tensor, tiles: list[Tile], sinks_H: Tensor, entries: Entries | None, num_visible_T: Tensor
    ) -> Tensor:
        segments: list[Tensor] = []
        if entries is not None:
            segments = read_segments(entries, int(num_visible_T.max()), HCA_SEGMENT)
        outputs = []
        for tile in tiles:
            part = slice(*tile.rows)
            visible = num_visible_T[part]
            needed = -(-int(visible.max()) // HCA_SEGMENT) if segments else 0
            outputs.append(attend_segments(q_THC[part], tile, sinks_H, segments[:needed], visible))
        return torch.cat(outputs)


def read_segments(entries: Entries, num_entries: int, size: int) -> list[Tensor]:
    """The first `num_entries` decoded entries in segments of `size`, zeros after the end. Views where possible."""
    if not num_entries:
        return []
    per_block = entries.part.num_rows
    num_blocks = -(-num_entries // per_block)
    block_ids = entries.block_ids[:num_blocks]
    decoded = entries.pool.decoded(entries.part)
    first, last = int(block_ids[0]), int(block_ids[-1])
    side_by_side = last - first == num_blocks - 1 and bool((block_ids[1:] - block_ids[:-1] == 1).all())
    picked = decoded[first : last + 1] if side_by_side else decoded[block_ids]
    flat = picked.reshape(-1, picked.shape[-1])
    segments = list(torch.split(flat, size))
    if len(segments[-1]) < size:
        tail = segments[-1]
        segments[-1] = torch.cat((tail, tail.new_zeros(size - len(tail), tail.shape[1])))
    return segments
