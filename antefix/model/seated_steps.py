"""Decode steps of many sequences on a GPU: the parts of each layer that work across tokens.

A decode step takes as many kernel launches for one sequence as for a hundred. Each sequence runs one token. The kernels
read all
inputs on the GPU: position, seat (`antefix.model.seats`) and block table come as one array of integers, and
everything else of a step is computed from it. So the host never waits, and a step can be recorded once and replayed
(`antefix.model.step_runner`).

A window is a run of records in its seat; attention reads it in addition to the picked entries. In HCA layers, all
entries are picked. Window records and tail rows are written at once, because nothing reads these places until the token
is kept. Overlap states are updated when tokens are kept.

In reproducible mode a query uses the same kernels as in a prefill chunk, so that it has the same bits.

Shapes:  S = sequences, B = blocks of the longest table, H = heads, C = head dim, W = n_win, R = RoPE dims,
         D = hidden size, E = entries, k = entries a query keeps.
"""

from __future__ import annotations

import collections.abc
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from antefix.layout import LayerKind, PartKind
from antefix.model.attention import Attention, CSACompressor
from antefix.model.compressor import Compressor
from antefix.model.host_rows import upload
from antefix.model.indexer import Indexer
from antefix.model.joined_weights import Products
from antefix.model.model import Model
from antefix.model.pool import BlockPool
from antefix.model.seats import CompressorRows, Seats
from antefix.model.window_state import Sequence
from antefix_kernels import decode_attention, gather, index_scores, operands, pack, prefill_attention, seated, topk

# Columns of a step's integers that come before the block table.
TOKEN, POSITION, SEAT, CUT = range(4)
NUM_COLUMNS = 4
TokenIds = collections.abc.Sequence[int] | np.ndarray[Any, np.dtype[np.int64]]
# Keys, queries per product, warps and stages: the tile in which `triton_ops` scores chunks in reproducible mode.
_REPRODUCIBLE_TILE = (128, 2, 4, 2)
# Memory for the entries that reproducible mode decodes in a step: enough for 64 sequences with 1M tokens in total.
_DECODED_BYTES_MAX = 1 << 29


def step_integers(
    sequences: collections.abc.Sequence[Sequence], tokens: TokenIds, seats: Seats
) -> np.ndarray[tuple[int, int], np.dtype[np.int32]]:
    """[S, 4 + B]: token, position, seat and cut of each sequence, then its block table, padded with 0."""
    longest = max(len(sequence.block_table) for sequence in sequences)
    rows = np.zeros((len(sequences), NUM_COLUMNS + longest), np.int32)
    rows[:, TOKEN] = tokens
    rows[:, SEAT] = seats.take([sequence.window for sequence in sequences])
    for row, sequence in zip(rows, sequences, strict=True):
        row[POSITION], row[CUT] = sequence.position, sequence.window.cut
        row[NUM_COLUMNS : NUM_COLUMNS + len(sequence.block_table)] = sequence.block_table
    return rows


@dataclass(frozen=True, slots=True)
class _Closing:
    """The groups of one kind that a step closes: slots [S] int32 of their entries (-1: this sequence closes none), the
    place of their rows, and cos and sin at their first tokens.
    """

    slots: Tensor
    closes: Tensor
    first_rows: Tensor
    prior_rows: Tensor
    visible: Tensor
    cos: Tensor
    sin: Tensor


class SeatedSteps:
    """One forward pass over sequences that run one token each, whose window states have seats.

    integers: made by `step_integers`, on the GPU. write: whether entries of complete groups are written.
    """

    def __init__(
        self, model: Model, pool: BlockPool, seats: Seats, integers: Tensor, *, write: bool, reproducible: bool
    ) -> None:
        self._model, self._pool, self._seats, self._write = model, pool, seats, write
        self._reproducible = reproducible
        self._geometry = geometry = model.config.geometry
        self._position: Tensor
        self._seat: Tensor
        self._tables: Tensor
        self._counts: Tensor
        self._firsts: Tensor
        self.tokens = self._take_integers(integers).long()
        self.positions = self._position.long()
        self._num = len(self.tokens)
        self._none = torch.zeros_like(self._seat)
        self._closing = {kind: self._close(kind) for kind in set(geometry.layers) - {LayerKind.WINDOW}}
        self._hca_slots = self._every_slot() if LayerKind.HCA in geometry.layers else None
        turn = (self._num, geometry.rope_dim // 2)
        self._turns = torch.ones(turn, device=integers.device), torch.zeros(turn, device=integers.device)

    def _take_integers(self, integers: Tensor) -> Tensor:
        """Read each row's position, seat, block table and window slots from the integers. Returns the tokens."""
        self._position = integers[:, POSITION].contiguous()
        self._seat = integers[:, SEAT].contiguous()
        self._tables = integers[:, NUM_COLUMNS:].contiguous()
        window = self._geometry.window
        slot = self._seat * (2 * window) + self._position % window
        # Each record is written to two slots, so that any window is one run of slots.
        self._window_slots = torch.cat((slot, slot + window))
        self._counts = (self._position + 1 - integers[:, CUT]).clamp(max=window)
        self._firsts = self._seat * (2 * window) + (self._position + 1 - self._counts) % window
        return integers[:, TOKEN]

    def attend(self, layer: int, attention: Attention, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """The layer's attention before its output projection, for x [S, D], normed: [S, H, C]."""
        done = attention.input_products(x)
        residual = attention.query_residual(x, done)
        q = attention.queries(residual, *rope)
        entries = attention.window_entries(x, *rope, done)
        ring = self._window(layer, entries)
        compressor = attention.compressor
        if compressor is None:
            return self._attend(q, ring, ring, self._none.unsqueeze(1), self._none, attention)
        if not isinstance(compressor, CSACompressor):
            records = self._compress(layer, PartKind.HCA_MAIN, compressor, x, done)
            slots = cast(Tensor, self._hca_slots)
            return self._attend(q, records, ring, slots, self._closing[LayerKind.HCA].visible, attention)
        records = self._compress(layer, PartKind.CSA_MAIN, compressor, x, done)
        indexer = compressor.indexer
        keys = self._compress(layer, PartKind.INDEXER_KEYS, indexer, x, done)
        picks = self._pick(keys, indexer, indexer.head_weights(x, done), residual, rope)
        return self._attend(q, records, ring, picks.slots, picks.counts, attention)

    def _window(self, layer: int, entries: Tensor) -> Tensor:
        """Write the window entries [S, C] of the new tokens. Returns the records [1, rows, R], in which each query's
        window is one run.
        """
        ring = self._seats.rings[layer].unsqueeze(0)
        pack.pack_entries(entries, self._geometry.rope_dim, pack.Target(records=ring, slots=self._window_slots))
        return ring

    def keep_all(self) -> None:
        """Update the overlap states for the groups that this step has closed."""
        self._keep(None)

    def keep(self, which: collections.abc.Sequence[int]) -> None:
        """Like `keep_all`, but for some of the sequences only."""
        wanted = np.zeros(self._num, np.int32)
        wanted[list(which)] = 1
        self._keep(upload(wanted, self._seat.device))

    def _keep(self, wanted: Tensor | None) -> None:
        if LayerKind.CSA not in self._closing:
            return
        closes = self._closing[LayerKind.CSA].closes
        closes = closes if wanted is None else closes * wanted
        for rows in (self._seats.main, self._seats.indexer):
            seated.move_overlaps(rows.tails, cast(Tensor, rows.overlaps), self._seat, closes)

    def _close(self, kind: LayerKind) -> _Closing:
        ratio = self._geometry.csa_ratio if kind is LayerKind.CSA else self._geometry.hca_ratio
        per_block = self._geometry.block_size // ratio
        entry = self._position // ratio
        block = self._tables.gather(1, (entry // per_block).long().unsqueeze(1)).squeeze(1)
        # Seat 0 belongs to rows that pad the batch.
        closes = ((self._position + 1) % ratio == 0) & (self._seat > 0)
        slots = torch.where(closes, block * per_block + entry % per_block, -1)
        cos, sin = self._model.rope(kind, entry * ratio)
        first_rows, prior_rows = self._group_rows(ratio)
        return _Closing(
            slots=slots if self._write else torch.full_like(slots, -1),
            closes=closes.int(),
            first_rows=first_rows,
            prior_rows=prior_rows,
            visible=(self._position + 1) // ratio,
            cos=cos.float().contiguous(),
            sin=sin.float().contiguous(),
        )

    def _group_rows(self, ratio: int) -> tuple[Tensor, Tensor]:
        """For the group that each row may complete: its first row in the result of `_take_rows`, and the first row of
        the previous group. If the previous group's Ca rows are the seat's overlap state, the second number is -1 -
        seat.
        """
        return self._seat * (2 * ratio), -1 - self._seat

    def _every_slot(self) -> Tensor:
        """Pool slots of all HCA entries in order, [S, E] int32."""
        per_block = self._geometry.hca_entries_per_block
        if per_block == 1:
            return self._tables
        rows = torch.arange(per_block, dtype=torch.int32, device=self._tables.device)
        return (self._tables.unsqueeze(2) * per_block + rows).flatten(1)

    def _compress(self, layer: int, kind: PartKind, compressor: Compressor, x: Tensor, done: Products) -> Tensor:
        """Store each token's rows, and write the entries of groups that are complete. Returns the part's records."""
        part = self._pool.part(layer, kind)
        records = self._pool.records(part)
        rows, packer = {
            PartKind.CSA_MAIN: (self._seats.main, pack.pack_csa),
            PartKind.INDEXER_KEYS: (self._seats.indexer, pack.pack_keys),
            PartKind.HCA_MAIN: (self._seats.hca, None),
        }[kind]
        place = rows.layers.index(layer)
        given = self._take_rows(rows, place, compressor, compressor.rows(x, done))
        closing = self._closing[self._geometry.layers[layer]]
        norm = pack.Norm(
            weight=compressor.kv_norm.weight.float(), cos=closing.cos, sin=closing.sin, eps=compressor.kv_norm.eps
        )
        target = pack.Target(records=records, slots=closing.slots)
        if packer is None:
            pack.pack_hca(*given, rows.no_bias, closing.first_rows, norm, target)
        else:
            overlap_kv, overlap_gate = cast(Tensor, rows.overlaps)[place]
            before = pack.Overlap(prior_rows=closing.prior_rows, kv=overlap_kv, gate=overlap_gate)
            packer(*given, rows.no_bias, closing.first_rows, before, norm, target)
        return records

    def _take_rows(
        self, rows: CompressorRows, place: int, compressor: Compressor, given: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Store each token's rows, given as kv and gate, in its tail. Returns kv and gates (with their bias) of all
        tails, as [rows, X].
        """
        tails = rows.tails[place]
        kv, gate = given
        seated.write_tails(kv, gate, compressor.position_bias.float(), self._position, self._seat, tails)
        flat = tails.view(-1, tails.shape[-1])
        # In memory a seat's kv rows come first, then its gate rows.
        return flat[: -compressor.ratio], flat[compressor.ratio :]

    def _pick(
        self, keys: Tensor, indexer: Indexer, weights: Tensor, residual: Tensor, rope: tuple[Tensor, Tensor]
    ) -> topk.Picks:
        """The k best visible entries of each sequence."""
        queries = indexer.queries(residual, *rope)
        num_entries_max = self._tables.shape[1] * keys.shape[1]
        visible = self._closing[LayerKind.CSA].visible
        group = index_scores.group_for(num_entries_max, indexer.topk)
        query = index_scores.prepare_queries(queries, weights.float(), 1.0, as_many=self._reproducible)
        scored = index_scores.index_scores(
            query,
            keys,
            self._tables,
            visible,
            num_entries_max,
            group=group,
            tile=_REPRODUCIBLE_TILE if self._reproducible else None,
            as_chunk=self._reproducible,
        )
        return topk.topk_entries(scored, visible, self._tables, keys.shape[1], indexer.topk)

    def _attend(
        self, q: Tensor, records: Tensor, ring: Tensor, slots: Tensor, counts: Tensor, attention: Attention
    ) -> Tensor:
        """Attention over each query's entries at its first `counts` slots [S, n], and over its window."""
        cos, sin = self._turns
        heads = operands.Heads(sinks=attention.sinks.float(), scale=1.0, cos=cos, sin=sin)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        if not self._reproducible:
            line = operands.Window(records=ring, firsts=self._firsts, counts=self._counts)
            decode_attention.sparse_attention(q.half(), records, slots, counts, line, heads, out)
            return out
        # In groups of as many sequences as the memory for decoded entries allows.
        num_bytes = 2 * _padded(self._geometry.head_dim) * (slots.shape[1] + self._geometry.window)
        together = max(_DECODED_BYTES_MAX // num_bytes, 1)
        for start in range(0, self._num, together):
            rows = slice(start, start + together)
            values, places, line = self._decoded(records, ring, slots[rows], rows)
            own = operands.Heads(sinks=heads.sinks, scale=1.0, cos=cos[rows], sin=sin[rows])
            prefill_attention.prefill_attention(q[rows].half(), values, places, counts[rows], line, own, out[rows])
        return out

    def _decoded(
        self, records: Tensor, ring: Tensor, slots: Tensor, rows: slice
    ) -> tuple[Tensor, Tensor, operands.Window]:
        """Decoded entries and windows of queries `rows`, side by side, as the prefill kernel reads them."""
        geometry, window = self._geometry, self._geometry.window
        num_listed = slots.numel()
        run = self._firsts[rows].unsqueeze(1) + torch.arange(window, dtype=torch.int32, device=slots.device)
        values = self._values(num_listed + run.numel(), slots.device)
        into = values[0, :, : geometry.head_dim]
        gather.unpack_entries(records, slots.clamp(min=0).flatten(), into[:num_listed], geometry.rope_dim)
        gather.unpack_entries(ring, run.flatten(), into[num_listed:], geometry.rope_dim)
        places = torch.arange(num_listed, dtype=torch.int32, device=slots.device).view(slots.shape)
        firsts = torch.arange(len(slots), dtype=torch.int32, device=slots.device) * window
        line = operands.Window(records=ring[:, : run.numel()], firsts=firsts, counts=self._counts[rows])
        return values, places, line

    def _values(self, num_entries: int, device: torch.device) -> Tensor:
        """Memory for `num_entries` decoded entries [1, n, padded head dim]; columns after the last dim are zeros."""
        dim = self._geometry.head_dim
        make = torch.empty if _padded(dim) == dim else torch.zeros
        return make(1, num_entries, _padded(dim), dtype=torch.float16, device=device)


def _padded(dim: int) -> int:
    """Columns of a decoded entry: the next power of two."""
    return 1 << (dim - 1).bit_length()
