"""Decode steps of many sequences on a GPU: the parts of each layer that work across tokens.

A decode step takes as many kernel launches for one sequence as for a hundred. Each sequence runs one token. The kernels
read all inputs on the GPU: position, seat (`antefix.model.seats`) and block table come as one array of integers, and
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
from antefix.model.norms_rope import turn_tables, wide_weight
from antefix.model.pool import BlockPool
from antefix.model.seats import CompressorRows, Seats
from antefix.model.side_streams import Side
from antefix.model.window_state import Sequence
from antefix_kernels import (
    decode_attention,
    gather,
    index_scores,
    operands,
    pack,
    prefill_attention,
    seated,
    step_numbers,
    topk,
)

# Columns of a step's integers that come before the block table.
TOKEN, POSITION, SEAT, CUT = range(4)
NUM_COLUMNS = step_numbers.COLUMNS
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
        row[NUM_COLUMNS : NUM_COLUMNS + len(sequence.block_table)] = sequence.table.ids
    return rows


@dataclass(frozen=True, slots=True)
class Closing:
    """The groups of one kind that a step closes (`step_numbers.Closing`), and cos and sin at their first tokens."""

    slots: Tensor
    closes: Tensor
    first_rows: Tensor
    prior_rows: Tensor
    visible: Tensor
    cos: Tensor
    sin: Tensor


Turns = tuple[Tensor, Tensor]


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
        self._none: Tensor
        self._turns: Turns
        self._closing: dict[LayerKind, Closing]
        # cos and sin [S, R / 2] of all rows, by kind of layer.
        self.ropes: dict[LayerKind, Turns]
        self.tokens = self._read(integers)
        self._num = len(self.tokens)
        self._hca_slots = self._every_slot() if LayerKind.HCA in geometry.layers else None

    def _read(self, integers: Tensor) -> Tensor:
        """Compute each row's numbers, groups and angles from the integers. Returns the tokens [S] int64."""
        geometry, model = self._geometry, self._model
        compressed = [kind for kind in (LayerKind.CSA, LayerKind.HCA) if kind in geometry.layers]
        found = step_numbers.step_numbers(
            integers,
            window=geometry.window,
            block_size=geometry.block_size,
            ratios=[geometry.csa_ratio if kind is LayerKind.CSA else geometry.hca_ratio for kind in compressed],
            main=model.rope_main.float(),
            other=model.rope_compress.float(),
            write=self._write,
        )
        self._position, self._seat, self._none = found.position, found.seat, found.none
        self._counts, self._firsts, self._window_slots = found.counts, found.firsts, found.window_slots
        self._tables, self._turns = found.tables, (found.turns[0], found.turns[1])
        factors = [model.config.rope_main.attention_factor] + [model.config.rope_compress.attention_factor] * (
            1 + len(compressed)
        )
        cos, sin = turn_tables(found.angles, factors)
        tables = {kind: 0 if kind is LayerKind.WINDOW else 1 for kind in set(geometry.layers)}
        self.ropes = {kind: (cos[table], sin[table]) for kind, table in tables.items()}
        self._closing = {
            kind: Closing(each.slots, each.closes, each.first_rows, each.prior_rows, each.visible, cos[i], sin[i])
            for i, (kind, each) in enumerate(zip(compressed, found.closing, strict=True), 2)
        }
        return integers[:, TOKEN].long()

    def attend(self, layer: int, attention: Attention, x: Tensor, rope: Turns) -> Tensor:
        """The layer's attention before its output projection, for x [S, D], normed: [S, H, C]."""
        done = attention.input_products(x)
        # What is stored, and the heads' queries, are computed next to one another.
        own = Side(x.device, 0)
        with own:
            ring = self._window(layer, attention.window_entries(x, *rope, done))
            records, keys = self._compress_all(layer, attention, x, done)
        residual = attention.query_residual(x, done)
        compressor = attention.compressor
        if not isinstance(compressor, CSACompressor):
            q = self._queries(attention, residual, rope)
            own.join()
            if compressor is None:
                return self._attend(q, ring, ring, self._none.unsqueeze(1), self._none, attention)
            slots = cast(Tensor, self._hca_slots)
            return self._attend(q, cast(Tensor, records), ring, slots, self._closing[LayerKind.HCA].visible, attention)
        # Entries are chosen by a chain of small kernels, next to which the heads' queries are computed.
        choice = Side(x.device, 1)
        with choice:
            indexer = compressor.indexer
            query = self._index_query(indexer, indexer.head_weights(x, done), residual, rope)
            own.join()
            picks = self._pick(cast(Tensor, keys), indexer, query)
        q = self._queries(attention, residual, rope)
        choice.join()
        return self._attend(q, cast(Tensor, records), ring, picks.slots, picks.counts, attention)

    def _queries(self, attention: Attention, residual: Tensor, rope: Turns) -> Tensor:
        """float16 queries [S, H, C]. In reproducible mode they are made by the kernel that makes those of chunks: one
        that stores float16 may sum a norm's squares in another order.
        """
        return attention.queries(residual, *rope, halves=not self._reproducible).half()

    def _compress_all(
        self, layer: int, attention: Attention, x: Tensor, done: Products
    ) -> tuple[Tensor | None, Tensor | None]:
        """Compress with all compressors of the layer. Returns the records of its entries and of its index keys."""
        compressor = attention.compressor
        if compressor is None:
            return None, None
        if not isinstance(compressor, CSACompressor):
            return self._compress(layer, PartKind.HCA_MAIN, compressor, x, done), None
        records = self._compress(layer, PartKind.CSA_MAIN, compressor, x, done)
        return records, self._compress(layer, PartKind.INDEXER_KEYS, compressor.indexer, x, done)

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
            weight=wide_weight(compressor.kv_norm), cos=closing.cos, sin=closing.sin, eps=compressor.kv_norm.eps
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

    def _index_query(self, indexer: Indexer, weights: Tensor, residual: Tensor, rope: Turns) -> index_scores.IndexQuery:
        queries = indexer.queries(residual, *rope)
        return index_scores.prepare_queries(queries, weights, 1.0, as_many=self._reproducible)

    def _pick(self, keys: Tensor, indexer: Indexer, query: index_scores.IndexQuery) -> topk.Picks:
        """The k best visible entries of each sequence."""
        num_entries_max = self._tables.shape[1] * keys.shape[1]
        visible = self._closing[LayerKind.CSA].visible
        group = index_scores.group_for(num_entries_max, indexer.topk)
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
        """Attention of float16 queries over their entries at their first `counts` slots [S, n] and their window."""
        cos, sin = self._turns
        heads = operands.Heads(sinks=attention.sinks.float(), scale=1.0, cos=cos, sin=sin)
        out = torch.empty(q.shape, dtype=self._model.dtype, device=q.device)
        if not self._reproducible:
            line = operands.Window(records=ring, firsts=self._firsts, counts=self._counts)
            decode_attention.sparse_attention(q, records, slots, counts, line, heads, out)
            return out
        # In groups of as many sequences as the memory for decoded entries allows.
        num_bytes = 2 * _padded(self._geometry.head_dim) * (slots.shape[1] + self._geometry.window)
        together = max(_DECODED_BYTES_MAX // num_bytes, 1)
        for start in range(0, self._num, together):
            rows = slice(start, start + together)
            values, places, line = self._decoded(records, ring, slots[rows], rows)
            own = operands.Heads(sinks=heads.sinks, scale=1.0, cos=cos[rows], sin=sin[rows])
            prefill_attention.prefill_attention(q[rows], values, places, counts[rows], line, own, out[rows])
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
