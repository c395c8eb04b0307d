"""Attention across tokens, in fixed shapes at fixed positions: a query gets the same sums however a prompt is cut.

A query's logits are laid out as [previous window tile | own window tile | far entries]. Window tiles are the spans
[i * n_win, (i + 1) * n_win) of positions. Keys that a query may not see get probability exactly 0 and add exactly 0. So
the same products result whether the neighbours in its tile are computed in this call, were computed before, or do not
exist yet. A maximum is exact in any order of its operands. Sums of floating point numbers run over parts of fixed size,
in a fixed order.

Shapes:  n = queries of one tile, H = heads, C = head dim, W = n_win, F = n * H rows, padded to ROW_TILE,
         k = selected entries a query, S = entries a segment, E = entries.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from antefix.model.numerics import multiply, multiply_each, pad_rows

NEGATIVE_INFINITY = float("-inf")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """Queries of one sequence in one window tile. keys: window KV of the previous and of the own tile, [W, C] each.

    rows: the first of the chunk's tokens that belong to this tile, and one past the last. slot: the first query's place
    in its tile. num_hidden: how many of the 2 W keys lie before the sequence's start or before the cut of a bounded
    replay.
    """

    rows: tuple[int, int]
    slot: int
    num_hidden: int
    previous: Tensor
    own: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowLine:
    """Window KV of one chunk, in order of position, beginning with the tile before the first query's tile.

    values: [tiles + 1, W, C]; tokens that do not exist (yet) are zeros.  position: the position of the chunk's first
    token, whose row is W + position mod W.  num_tokens: T.  cut: tokens before this position are not attended to.
    """

    values: Tensor
    position: int
    num_tokens: int
    cut: int = 0

    def part(self, first: int, stop: int) -> WindowLine:
        """The part of the line that the chunk's tokens [first, stop) attend to."""
        window = self.values.shape[1]
        position = self.position + first
        skipped = position // window - self.position // window
        num_tiles = -(-(position % window + stop - first) // window)
        values = self.values[skipped : skipped + num_tiles + 1]
        return WindowLine(values=values, position=position, num_tokens=stop - first, cut=self.cut)

    def tiles(self) -> Iterator[Tile]:
        window = self.values.shape[1]
        first_tile, slot = divmod(self.position, window)
        start = 0
        for i in range(len(self.values) - 1):
            stop = min((i + 1) * window - slot, self.num_tokens)
            yield Tile(
                rows=(start, stop),
                slot=(slot + start) % window,
                num_hidden=max(self.cut - (first_tile + i - 1) * window, 0),
                previous=self.values[i],
                own=self.values[i + 1],
            )
            start = stop


def line_up(ring_WC: Tensor, new_TC: Tensor, position: int, cut: int = 0) -> WindowLine:
    """A chunk of T tokens at `position` behind the ring of earlier window KV (slot p mod W), which is not changed."""
    window, num_new = len(ring_WC), len(new_TC)
    slot = position % window
    num_tiles = -(-(slot + num_new) // window)
    line = ring_WC.new_zeros((num_tiles + 1) * window, ring_WC.shape[1])
    line[slot : slot + window] = ring_WC.roll(-slot, 0)
    line[slot + window : slot + window + num_new] = new_TC
    return WindowLine(values=line.view(num_tiles + 1, window, -1), position=position, num_tokens=num_new, cut=cut)


def advance_ring(ring_WC: Tensor, new_TC: Tensor, position: int) -> Tensor:
    """Write a chunk into the ring in place: new tokens overwrite the slots of the oldest. Returns the ring."""
    window = len(ring_WC)
    kept = new_TC[-window:]
    slots = (torch.arange(len(kept), device=ring_WC.device) + position + len(new_TC) - len(kept)) % window
    ring_WC[slots] = kept
    return ring_WC


def window_logits(q_FC: Tensor, tile: Tile, num_heads: int) -> Tensor:
    """[F, 2W]: logits against the previous and the own tile, -inf outside each query's window."""
    window = len(tile.own)
    num_queries = tile.rows[1] - tile.rows[0]
    logits = torch.cat((multiply(q_FC, tile.previous.T), multiply(q_FC, tile.own.T)), dim=1)
    slots = torch.arange(tile.slot, tile.slot + num_queries, device=q_FC.device).unsqueeze(1)
    keys = torch.arange(window, device=q_FC.device)
    hidden = torch.cat((keys <= slots, keys > slots), 1)
    if tile.num_hidden:
        hidden[:, : tile.num_hidden] = True
    live = logits[: num_queries * num_heads].view(num_queries, num_heads, 2 * window)
    live.masked_fill_(hidden.unsqueeze(1), NEGATIVE_INFINITY)
    return logits


def attend_selected(q_nHC: Tensor, tile: Tile, sinks_H: Tensor, entries_nkC: Tensor, live_nk: Tensor) -> Tensor:
    """Attention over the window and each query's own k entries: [n, H, C]. live: entries that are not get weight 0."""
    num_queries, num_heads, _ = q_nHC.shape
    rows = num_queries * num_heads
    q_FC = pad_rows(q_nHC.flatten(0, 1))
    near = window_logits(q_FC, tile, num_heads)
    far = multiply_each(q_nHC, entries_nkC.transpose(1, 2)).masked_fill_(~live_nk.unsqueeze(1), NEGATIVE_INFINITY)
    sinks = _sink_rows(sinks_H, num_queries, len(q_FC))
    top = torch.maximum(near.amax(1, keepdim=True), sinks)
    top[:rows] = torch.maximum(top[:rows], far.flatten(0, 1).amax(1, keepdim=True))
    total, weighted = _window_sums(near, top, sinks, tile)
    far_weights = torch.exp(far - top[:rows].view(num_queries, num_heads, 1))
    total = total[:rows] + far_weights.sum(2).view(rows, 1)
    weighted = weighted[:rows] + multiply_each(far_weights, entries_nkC).flatten(0, 1)
    return (weighted / total).view_as(q_nHC)


def attend_segments(
    q_nHC: Tensor, tile: Tile, sinks_H: Tensor, segments: list[Tensor], num_visible_n: Tensor
) -> Tensor:
    """Attention over the window and all visible entries, given as segments of S entries each: [n, H, C].

    Entries beyond a query's `num_visible` get weight 0; their values must be finite.
    """
    num_queries, num_heads, _ = q_nHC.shape
    rows = num_queries * num_heads
    q_FC = pad_rows(q_nHC.flatten(0, 1))
    near = window_logits(q_FC, tile, num_heads)
    sinks = _sink_rows(sinks_H, num_queries, len(q_FC))
    top = torch.maximum(near.amax(1, keepdim=True), sinks)
    far = []
    for index, segment in enumerate(segments):
        logits = multiply(q_FC, segment.T)
        entries = torch.arange(index * len(segment), (index + 1) * len(segment), device=q_FC.device)
        hidden = (entries >= num_visible_n.unsqueeze(1)).unsqueeze(1)
        logits[:rows].view(num_queries, num_heads, -1).masked_fill_(hidden, NEGATIVE_INFINITY)
        top = torch.maximum(top, logits.amax(1, keepdim=True))
        far.append(logits)
    total, weighted = _window_sums(near, top, sinks, tile)
    for logits, segment in zip(far, segments, strict=True):
        weights = torch.exp(logits - top)
        total = total + weights.sum(1, keepdim=True)
        weighted = weighted + multiply(weights, segment)
    return (weighted / total)[:rows].view_as(q_nHC)


def _sink_rows(sinks_H: Tensor, num_queries: int, num_rows: int) -> Tensor:
    return pad_rows(sinks_H.repeat(num_queries).unsqueeze(1))[:num_rows]


def _window_sums(near: Tensor, top: Tensor, sinks: Tensor, tile: Tile) -> tuple[Tensor, Tensor]:
    """The window part's denominator [F, 1] (sink included) and its weighted sum of values [F, C]."""
    window = len(tile.own)
    weights = torch.exp(near - top)
    total = torch.exp(sinks - top) + weights.sum(1, keepdim=True)
    weighted = multiply(weights[:, :window], tile.previous) + multiply(weights[:, window:], tile.own)
    return total, weighted
