"""Decode steps of many sequences at once: each layer's attention, index, compressors and windows as one set of calls.

Each sequence runs one token. `attend` computes attention over a token's own tile and over the previous tile. Both tiles
are in the ring already: slots up to the token's own slot hold the own tile, later slots the previous tile. So one ring
serves as operand for both tiles and gives the same sums, because keys that do not belong to a tile have weight 0 in its
sum. If a sequence has fewer entries than another, the remaining entries are masked in whole segments, which add exactly
nothing. A batched product is the same chain of multiply-adds as a single product (`numerics`); the probe of
`arithmetic` compares the two. So each sequence gets the bits that it would get alone.

Shapes:  S = sequences, H = heads, C = head dim (entries) or indexer dim (keys), W = n_win, I = indexer heads,
         E = entries, k = entries a query keeps, G = groups that this step closes, m = ratio, R = RoPE dims.
"""

from __future__ import annotations

import collections.abc
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor

from antefix.layout import LayerKind, PartKind
from antefix.model.attention import Attention, CSACompressor
from antefix.model.compiled.switch import is_compiled
from antefix.model.compressor import Compressor, finish_entries, pool_disjoint, pool_pairs
from antefix.model.indexer import top_entries
from antefix.model.model import Model
from antefix.model.numerics import multiply_each, pad_rows
from antefix.model.ops import HCA_SEGMENT, KEY_TILE, Entries, read_entries
from antefix.model.pool import BlockPool
from antefix.model.quant import round_queries
from antefix.model.window_state import Sequence

# Keys of several sequences are copied side by side and scored together if they are at most this many: with 64 dims they
# fit a core's cache. Longer sequences' keys are read in place, because copying them would be most of the work.
KEYS_TOGETHER_MAX = 1 << 14
_HIDDEN = float("-inf")


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRows:
    """What a layer computes for each token alone. index: the indexer's rows, queries and head weights (CSA).

    q [S, H, C], window [S, C], compressed [2, S, columns], index ([2, S, columns], [S, I, C], [S, I]).
    """

    q: Tensor
    window: Tensor
    compressed: Tensor | None = None
    index: tuple[Tensor, Tensor, Tensor] | None = None

    def at(self, rows: slice | Tensor) -> TokenRows:
        """The results of some tokens."""
        return TokenRows(
            q=self.q[rows],
            window=self.window[rows],
            compressed=None if self.compressed is None else self.compressed[:, rows],
            index=None if self.index is None else (self.index[0][:, rows], self.index[1][rows], self.index[2][rows]),
        )


class Steps:
    """One forward pass over sequences that run one token each."""

    is_compiled = False

    def __init__(
        self, model: Model, pool: BlockPool, sequences: collections.abc.Sequence[Sequence], write: bool
    ) -> None:
        self._model, self._pool, self._write = model, pool, write
        self._windows = [sequence.window for sequence in sequences]
        self._positions = [sequence.position for sequence in sequences]
        self._geometry = model.config.geometry
        device = model.device
        tables = np.zeros((len(sequences), max(len(sequence.block_table) for sequence in sequences)), np.int64)
        for row, sequence in zip(tables, sequences, strict=True):
            row[: len(sequence.block_table)] = sequence.block_table
        self._tables = torch.from_numpy(tables).to(device)
        self._position = torch.tensor(self._positions, device=device)
        self._each = torch.arange(len(sequences), device=device)
        self._slots = self._position % self._geometry.window
        self._hidden = self._hide(torch.tensor([window.cut for window in self._windows], device=device))
        self._visible = {ratio: (self._position + 1) // ratio for ratio in self._ratios()}
        self._new_window: list[Tensor] = []
        self._window_rows: Tensor | None = None
        # For each sequence, the copies to make when its token is kept: (target, source).
        self._moves: list[list[tuple[Tensor, Tensor]]] = [[] for _ in sequences]
        self._closing = {ratio: [s for s, at in enumerate(self._positions) if (at + 1) % ratio == 0]
                         for ratio in self._ratios()}  # fmt: skip
        self._ropes: dict[LayerKind, tuple[Tensor, Tensor]] = {}

    def attend(self, layer: int, attention: Attention, rows: TokenRows) -> Tensor:
        """The layer's attention before its output projection: [S, H, C]. The entries of groups that are complete are
        written too.
        """
        ring = torch.stack([window.window[layer] for window in self._windows])
        ring[self._each, self._slots] = rows.window
        self._new_window.append(rows.window)
        q = rows.q.to(ring.dtype)
        near = multiply_each(q, ring.mT)
        near = torch.cat([near.masked_fill(hidden, _HIDDEN) for hidden in self._hidden], 2)
        sinks = attention.sinks.to(ring.dtype).view(1, -1, 1)
        if rows.compressed is None:
            return _attend_window(near, ring, sinks).to(rows.q.dtype)
        if rows.index is None:
            self._compress(layer, PartKind.HCA_MAIN, cast(Compressor, attention.compressor), rows.compressed)
            entries, hidden = self._all_entries(layer)
            return _attend_all(q, near, ring, sinks, entries, hidden).to(rows.q.dtype)
        compressor = cast(CSACompressor, attention.compressor)
        index_rows, queries, weights = rows.index
        self._compress(layer, PartKind.CSA_MAIN, compressor, rows.compressed)
        self._compress(layer, PartKind.INDEXER_KEYS, compressor.indexer, index_rows)
        picked = self._pick(layer, queries, weights, compressor)
        entries = self._read(layer, PartKind.CSA_MAIN, picked.clamp(min=0))
        return _attend_picked(q, near, ring, sinks, entries, picked >= 0).to(rows.q.dtype)

    def keep_all(self) -> None:
        self.keep(range(len(self._windows)))

    def keep(self, which: collections.abc.Sequence[int]) -> None:
        """Add the tokens of these sequences to their window states. The caller advances the positions.

        Call it once per sequence. Before their window states are changed, a failed call can be repeated.
        """
        if self._window_rows is None:
            self._window_rows = torch.stack(self._new_window, 1)
        for s in which:
            place = self._windows[s].window[:, self._positions[s] % self._geometry.window]
            self._moves[s].append((place, self._window_rows[s]))
        targets, sources = zip(*(move for s in which for move in self._moves[s]), strict=True)
        torch._foreach_copy_(targets, sources)

    def _ratios(self) -> set[int]:
        geometry = self._geometry
        return {geometry.ratio(i) for i, kind in enumerate(geometry.layers) if kind is not LayerKind.WINDOW}

    def _hide(self, cuts: Tensor) -> tuple[Tensor, Tensor]:
        """Which ring slots are hidden as keys of the previous tile, and as keys of the own tile: [S, 1, W] each."""
        slots, window = self._slots.unsqueeze(1), self._geometry.window
        keys = torch.arange(window, device=slots.device)
        first = self._position.unsqueeze(1) - slots
        before, own = keys <= slots, keys > slots
        before = before | (first - window + keys < cuts.unsqueeze(1))
        own = own | (first + keys < cuts.unsqueeze(1))
        return before.unsqueeze(1), own.unsqueeze(1)

    def _read(self, layer: int, kind: PartKind, indices: Tensor, rows: slice = slice(None)) -> Tensor:
        """Decoded entries by their index in each sequence: from indices [S, n] of sequences `rows` to [S, n, C]."""
        part = self._pool.part(layer, kind)
        decoded = self._pool.decoded(part)
        home = torch.div(indices, part.num_rows, rounding_mode="floor")
        blocks, places = self._tables[rows].gather(1, home), indices % part.num_rows
        if not decoded.is_contiguous():
            return decoded[blocks, places]
        flat = (blocks * part.num_rows + places).flatten()
        return decoded.view(-1, decoded.shape[2]).index_select(0, flat).view(*indices.shape, decoded.shape[2])

    def _all_entries(self, layer: int) -> tuple[Tensor, Tensor]:
        """Every sequence's visible entries in whole segments: values [S, E, C], and which are hidden [S, 1, E]."""
        visible = self._visible[self._geometry.hca_ratio].unsqueeze(1)
        most = (max(self._positions) + 1) // self._geometry.hca_ratio
        indices = torch.arange(-(-most // HCA_SEGMENT) * HCA_SEGMENT, device=visible.device)
        # Hidden entries repeat the last visible one. If there is none, the values read may be NaN.
        values = self._read(layer, PartKind.HCA_MAIN, torch.minimum(indices, visible - 1).clamp(min=0))
        values.masked_fill_((visible == 0).unsqueeze(2), 0.0)
        return values, (indices >= visible).unsqueeze(1)

    def _pick(self, layer: int, q_SIC: Tensor, weights_SI: Tensor, compressor: CSACompressor) -> Tensor:
        """Each sequence's k best visible entries [S, k], ascending, then -1."""
        ratio, k = self._geometry.csa_ratio, compressor.indexer.topk
        visible, most = self._visible[ratio], (max(self._positions) + 1) // ratio
        queries = round_queries(q_SIC, self._pool.layout)
        if most <= k:
            return top_entries(queries.new_empty(len(queries), most), visible, k)
        weights = weights_SI.to(queries.dtype).unsqueeze(1)
        num_keys = -(-most // KEY_TILE) * KEY_TILE
        together = max(KEYS_TOGETHER_MAX // num_keys, 1)
        scores = []
        for start in range(0, len(queries), together):
            rows = slice(start, start + together)
            hits = multiply_each(queries[rows], self._keys(layer, rows, num_keys, len(queries[rows])).mT).relu_()
            scores.append(multiply_each(weights[rows], hits).squeeze(1))
        indices = torch.arange(num_keys, device=visible.device)
        return top_entries(torch.cat(scores).masked_fill_(indices >= visible.unsqueeze(1), _HIDDEN), visible, k)

    def _keys(self, layer: int, rows: slice, num_keys: int, num_sequences: int) -> Tensor:
        """Keys of some sequences [S, E, C]. Keys after the last visible key of a sequence mean nothing."""
        if num_sequences > 1:
            indices = torch.arange(num_keys, device=self._tables.device).expand(num_sequences, -1)
            last = self._tables.shape[1] * self._pool.part(layer, PartKind.INDEXER_KEYS).num_rows - 1
            return self._read(layer, PartKind.INDEXER_KEYS, indices.clamp(max=last), rows)
        part = self._pool.part(layer, PartKind.INDEXER_KEYS)
        num_blocks = min(-(-num_keys // part.num_rows), self._tables.shape[1])
        entries = Entries(pool=self._pool, part=part, block_ids=self._tables[rows][0, :num_blocks])
        keys = read_entries(entries, min(num_keys, num_blocks * part.num_rows), KEY_TILE)
        return pad_rows(keys, num_keys).unsqueeze(0)

    def _compress(self, layer: int, kind: PartKind, compressor: Compressor, new: Tensor) -> None:
        """Close the groups that the new rows [2, S, columns] complete; the other rows are kept in the tails."""
        ratio, is_keys = compressor.ratio, kind is PartKind.INDEXER_KEYS
        states = [(window.indexer if is_keys else window.main)[layer] for window in self._windows]
        closing = self._closing[ratio]
        for s, (state, at, rows) in enumerate(zip(states, self._positions, new.unbind(1), strict=True)):
            if (at + 1) % ratio:
                self._moves[s].append((state.tail[:, at % ratio], rows))
        if not closing:
            return
        last = new[:, closing].unsqueeze(2)
        groups = last
        if ratio > 1:
            before = torch.stack([states[s].tail[:, : ratio - 1] for s in closing], 1)
            groups = torch.cat((before, last), 2)
        overlaps = [overlap for s in closing if (overlap := states[s].overlap) is not None]
        if self._write:
            self._write_groups(layer, kind, compressor, groups, torch.stack(overlaps, 1) if overlaps else None)
        ends = groups[..., : compressor.width].unbind(1)
        for s, overlap, end in zip(closing[: len(overlaps)], overlaps, ends[: len(overlaps)], strict=True):
            self._moves[s].append((overlap, end))

    def _write_groups(
        self, layer: int, kind: PartKind, compressor: Compressor, groups: Tensor, overlaps: Tensor | None
    ) -> None:
        """Write the entries of the groups [2, G, m, columns] that this step closes.  overlaps [2, G, m, C]: CSA."""
        ratio, closing = compressor.ratio, self._closing[compressor.ratio]
        pooled = pool_disjoint(groups) if overlaps is None else pool_pairs(groups, overlaps)
        values = finish_entries(pooled, compressor.kv_norm, *self._group_rope(layer, closing, ratio))
        part = self._pool.part(layer, kind)
        indices = self._position[closing] // ratio
        blocks = self._tables[closing].gather(1, (indices // part.num_rows).unsqueeze(1)).squeeze(1)
        self._pool.write(part, blocks, indices % part.num_rows, values)

    def _group_rope(self, layer: int, closing: list[int], ratio: int) -> tuple[Tensor, Tensor]:
        """cos and sin at each closing group's first token. For all layers of one kind, the values are the same."""
        kind = self._geometry.layers[layer]
        if kind not in self._ropes:
            self._ropes[kind] = self._model.rope(kind, self._position[closing] + 1 - ratio)
        return self._ropes[kind]


def steps_of(model: Model, pool: BlockPool, sequences: collections.abc.Sequence[Sequence], *, write: bool) -> Steps:
    """The `Steps` of sequences that run one token each, with compiled kernels if they are switched on."""
    if all(is_compiled(sequence.window.window) and sequence.window.window.is_contiguous() for sequence in sequences):
        from antefix.model.compiled.steps import CompiledSteps

        return CompiledSteps(model, pool, sequences, write)
    return Steps(model, pool, sequences, write)


def _attend_window(near: Tensor, ring: Tensor, sinks: Tensor) -> Tensor:
    top = torch.maximum(near.amax(2, keepdim=True), sinks)
    total, weighted = _window_sums(near, top, sinks, ring)
    return weighted / total


def _attend_all(q: Tensor, near: Tensor, ring: Tensor, sinks: Tensor, entries_SEC: Tensor, hidden: Tensor) -> Tensor:
    """Attention over the window and all visible entries, segment by segment."""
    top = torch.maximum(near.amax(2, keepdim=True), sinks)
    if not entries_SEC.shape[1]:
        total, weighted = _window_sums(near, top, sinks, ring)
        return weighted / total
    far = multiply_each(q, entries_SEC.mT).masked_fill(hidden, _HIDDEN)
    top = torch.maximum(top, far.amax(2, keepdim=True))
    total, weighted = _window_sums(near, top, sinks, ring)
    weights = torch.exp(far - top)
    for part, values in zip(weights.split(HCA_SEGMENT, 2), entries_SEC.split(HCA_SEGMENT, 1), strict=True):
        part = part.contiguous()
        total = total + part.sum(2, keepdim=True)
        weighted = weighted + multiply_each(part, values)
    return weighted / total


def _attend_picked(q: Tensor, near: Tensor, ring: Tensor, sinks: Tensor, entries_SkC: Tensor, live: Tensor) -> Tensor:
    far = multiply_each(q, entries_SkC.mT).masked_fill(~live.unsqueeze(1), _HIDDEN)
    top = torch.maximum(torch.maximum(near.amax(2, keepdim=True), sinks), far.amax(2, keepdim=True))
    total, weighted = _window_sums(near, top, sinks, ring)
    weights = torch.exp(far - top)
    total = total + weights.sum(2, keepdim=True)
    return (weighted + multiply_each(weights, entries_SkC)) / total


def _window_sums(near: Tensor, top: Tensor, sinks: Tensor, ring: Tensor) -> tuple[Tensor, Tensor]:
    """The window part's denominator [S, H, 1] (sink included) and its weighted sum of values [S, H, C]."""
    weights = torch.exp(near - top)
    total = torch.exp(sinks - top) + weights.sum(2, keepdim=True)
    before, own = weights.chunk(2, 2)
    return total, multiply_each(before, ring) + multiply_each(own, ring)
