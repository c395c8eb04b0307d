"""Steps of several tokens per sequence on a GPU: short prefills, drafted tokens and decode steps in shared launches.

Rows are tokens, sequence after sequence (ragged). All inputs of a launch are on the GPU in one array of integers whose
size depends on the bucket alone, so such a call can be recorded and replayed like a step.

A sequence's new tokens would overwrite rows of its ring and tails that the first of the new tokens still need. So each
layer copies old and new rows into one line, in order, and reads the line. Rings, tails and overlap states are updated
when tokens are kept:

    window line     n_win records per sequence, oldest first, then its new records
    group line      the rows of the sequence's unfinished group, then its new rows
    new rows        per layer: window records, and the compressors' kv and gates (with their bias)

Shapes:  N = rows, S = sequences (the last is a dummy for rows that pad the bucket), B = blocks of the longest table,
         W = n_win, R = record bytes, r = ratio, X = width of a compressor's rows, C = entry width.
"""

from __future__ import annotations

import collections.abc
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from antefix.block import TokenArray
from antefix.layout import LayerKind
from antefix.model.compressor import Compressor
from antefix.model.host_rows import upload
from antefix.model.seated_steps import Closing, SeatedSteps
from antefix.model.seats import CompressorRows, Seats
from antefix.model.window_state import Sequence
from antefix_kernels import gather, operands, pack, seated

# Most tokens and sequences of one call.
TOKENS_MAX, SEQUENCES_MAX = 512, 64
# A row has: token, position, number of its sequence. A sequence has, before its block table: seat, cut, position before
# the call, and its first row.
_ROW_COLUMNS = 3
SEAT, CUT, FIRST, START = range(4)
_SEQUENCE_COLUMNS = 4
_Integers = np.ndarray[Any, np.dtype[np.int32]]


@dataclass(frozen=True, slots=True)
class ChunkShape:
    """Numbers of rows, of sequences (the dummy included), and of blocks of the longest table."""

    rows: int
    sequences: int
    blocks: int

    @property
    def num_integers(self) -> int:
        return self.rows * _ROW_COLUMNS + self.sequences * (_SEQUENCE_COLUMNS + self.blocks)


def shape_of(batch: collections.abc.Sequence[tuple[Sequence, TokenArray]]) -> ChunkShape:
    num_rows = sum(len(tokens) for _, tokens in batch)
    return ChunkShape(num_rows, len(batch) + 1, max(len(sequence.block_table) for sequence, _ in batch))


def chunk_integers(
    batch: collections.abc.Sequence[tuple[Sequence, TokenArray]], seats: Seats, shape: ChunkShape
) -> _Integers:
    """[N * 3 + S * (4 + B)]: the rows' tokens, positions, sequences, then each sequence's integers and block table."""
    integers = np.zeros(shape.num_integers, np.int32)
    rows = integers[: shape.rows * _ROW_COLUMNS].reshape(_ROW_COLUMNS, shape.rows)
    sequences = integers[rows.size :].reshape(shape.sequences, -1)
    numbers = seats.take([sequence.window for sequence, _ in batch])
    start = 0
    for number, ((sequence, tokens), seat) in enumerate(zip(batch, numbers, strict=True)):
        own, table = slice(start, start + len(tokens)), sequence.block_table
        rows[0, own], rows[2, own] = tokens, number
        rows[1, own] = np.arange(sequence.position, sequence.position + len(tokens))
        sequences[number, :_SEQUENCE_COLUMNS] = seat, sequence.window.cut, sequence.position, start
        sequences[number, _SEQUENCE_COLUMNS : _SEQUENCE_COLUMNS + len(table)] = table
        start += len(tokens)
    rows[2, start:] = shape.sequences - 1
    sequences[len(batch) :, START] = start
    return integers


class NewRows:
    """The new rows of every layer, for one call at a time.

    window [L, N, R] uint8; kinds: for each kind of compressor [layers, 2, N, X] float32, kv and then gates.
    """

    def __init__(self, seats: Seats, num_rows: int) -> None:
        rings = seats.rings
        self.window = rings.new_empty(rings.shape[0], num_rows, rings.shape[2])
        self.kinds = tuple(
            rows.tails.new_empty(len(rows.layers), 2, num_rows, rows.tails.shape[-1]) for rows in _kinds(seats)
        )

    def copied(self, num_rows: int) -> NewRows:
        copy: NewRows = object.__new__(NewRows)
        copy.window = self.window[:, :num_rows].clone()
        copy.kinds = tuple(rows[:, :, :num_rows].clone() for rows in self.kinds)
        return copy


def _kinds(seats: Seats) -> tuple[CompressorRows, ...]:
    return seats.main, seats.indexer, seats.hca


class SeatedChunks(SeatedSteps):
    """One forward pass over new tokens of several sequences, whose window states have seats.

    integers: made by `chunk_integers`, on the GPU.  new: where new rows are written.
    """

    def __init__(self, *args: Any, shape: ChunkShape, new: NewRows, **settings: Any) -> None:
        self.shape, self._new = shape, new
        super().__init__(*args, **settings)

    def _read(self, integers: Tensor) -> Tensor:
        geometry, device = self._geometry, integers.device
        tokens = self._take_integers(integers).long()
        positions = self._position.long()
        self._none = torch.zeros_like(self._seat)
        self._closing = {kind: self._close(kind) for kind in set(geometry.layers) - {LayerKind.WINDOW}}
        turn = (len(tokens), geometry.rope_dim // 2)
        self._turns = torch.ones(turn, device=device), torch.zeros(turn, device=device)
        self.ropes = {kind: self._model.rope(kind, positions) for kind in set(geometry.layers)}
        return tokens

    def _close(self, kind: LayerKind) -> Closing:
        ratio = self._geometry.csa_ratio if kind is LayerKind.CSA else self._geometry.hca_ratio
        per_block = self._geometry.block_size // ratio
        entry = self._position // ratio
        block = self._tables.gather(1, (entry // per_block).long().unsqueeze(1)).squeeze(1)
        # Seat 0 belongs to rows that pad the batch.
        closes = ((self._position + 1) % ratio == 0) & (self._seat > 0)
        slots = torch.where(closes, block * per_block + entry % per_block, -1)
        cos, sin = self._model.rope(kind, entry * ratio)
        first_rows, prior_rows = self._group_rows(ratio)
        return Closing(
            slots=slots if self._write else torch.full_like(slots, -1),
            closes=closes.int(),
            first_rows=first_rows,
            prior_rows=prior_rows,
            visible=(self._position + 1) // ratio,
            cos=cos.float().contiguous(),
            sin=sin.float().contiguous(),
        )

    def _take_integers(self, integers: Tensor) -> Tensor:
        """Read each row's position, seat, block table and window from the integers. Returns the tokens."""
        shape, window, device = self.shape, self._geometry.window, integers.device
        rows = integers[: shape.rows * _ROW_COLUMNS].view(_ROW_COLUMNS, shape.rows)
        sequences = integers[shape.rows * _ROW_COLUMNS :].view(shape.sequences, -1)
        self._position, owner = rows[1], rows[2]
        mine = sequences.index_select(0, owner)
        self._seat = mine[:, SEAT].contiguous()
        self._first = mine[:, FIRST]
        self._tables = mine[:, _SEQUENCE_COLUMNS:].contiguous()
        self._owner, self._row = owner, torch.arange(shape.rows, dtype=torch.int32, device=device)
        self._seats_S, self._firsts_S = sequences[:, SEAT].contiguous(), sequences[:, FIRST].contiguous()
        self._starts_S = sequences[:, START].contiguous()
        # Sequence i's part of the window line begins at i * W plus its first row: each earlier one adds W old records.
        each, back = (torch.arange(n, dtype=torch.int32, device=device) for n in (shape.sequences, window))
        self._ring_rows = ((self._seats_S * (2 * window) + self._firsts_S % window).unsqueeze(1) + back).flatten()
        self._line_rows = ((each * window + self._starts_S).unsqueeze(1) + back).flatten()
        self._own_rows = (owner + 1) * window + self._row
        self._counts = (self._position + 1 - mine[:, CUT]).clamp(max=window)
        self._firsts = self._own_rows + 1 - self._counts
        # The same size for all buckets, because attention is compiled for it.
        num_rows = TOKENS_MAX + (SEQUENCES_MAX + 1) * window
        rings = self._seats.rings
        self._line = rings.new_empty(1, max(num_rows, shape.rows + shape.sequences * window), rings.shape[2])
        return rows[0]

    def _window(self, layer: int, entries: Tensor) -> Tensor:
        ring = self._seats.rings[layer].unsqueeze(0)
        gather.copy_records(ring, self._ring_rows, self._line, self._line_rows)
        for records, slots in ((self._line, self._own_rows), (self._new.window[layer].unsqueeze(0), self._row)):
            pack.pack_entries(entries, self._geometry.rope_dim, pack.Target(records=records, slots=slots))
        return self._line

    def _group_rows(self, ratio: int) -> tuple[Tensor, Tensor]:
        """For the group that each row may complete: its first row in the result of `_take_rows`, and the first row of
        the previous group. If the previous group's Ca rows are the seat's overlap state, the second number is -1 -
        seat.
        """
        line = self._owner * ratio + self._row + self._first % ratio
        first_rows = (line - (ratio - 1)).clamp(min=0)
        is_first = self._position // ratio == self._first // ratio
        return first_rows, torch.where(is_first, -1 - self._seat, first_rows - ratio)

    def _take_rows(
        self, rows: CompressorRows, place: int, compressor: Compressor, given: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        kv, gate = given
        kind = next(number for number, each in enumerate(_kinds(self._seats)) if each is rows)
        tails, ratio = rows.tails[place], compressor.ratio
        line = tails.new_empty(2, self.shape.rows + self.shape.sequences * ratio, tails.shape[-1])
        seated.line_up_rows(
            kv,
            gate,
            compressor.position_bias.float(),
            seated.Lines(
                positions=self._position,
                owners=self._owner,
                seats=self._seats_S,
                firsts=self._firsts_S,
                starts=self._starts_S,
            ),
            tails,
            line,
            self._new.kinds[kind][place],
        )
        return line[0], line[1]

    def _decoded(
        self, records: Tensor, ring: Tensor, slots: Tensor, rows: slice
    ) -> tuple[Tensor, Tensor, operands.Window]:
        """Decoded entries of queries `rows`, side by side, and the decoded window line of all sequences."""
        num_listed, num_line = slots.numel(), ring.shape[1]
        values = self._values(num_listed + num_line, slots.device)
        into = values[0, :, : self._geometry.head_dim]
        gather.unpack_entries(records, slots.clamp(min=0).flatten(), into[:num_listed], self._geometry.rope_dim)
        every = torch.arange(num_line, dtype=torch.int32, device=slots.device)
        # Memory after the last row was never written, so it is not decoded.
        every = every.clamp(max=self.shape.rows + self.shape.sequences * self._geometry.window - 1)
        gather.unpack_entries(ring, every, into[num_listed:], self._geometry.rope_dim)
        places = torch.arange(num_listed, dtype=torch.int32, device=slots.device).view(slots.shape)
        return values, places, operands.Window(records=ring, firsts=self._firsts[rows], counts=self._counts[rows])


@dataclass(slots=True, weakref_slot=True)
class PendingChunk:
    """New rows of a call that wait until it is known which tokens are kept.

    seat_numbers, firsts, starts: for each sequence of the call, its seat, its position before the call and its first
    row. counts: how many tokens the sequence was given; kept: how many are kept; moved: how many its seat has been
    updated for.
    """

    seats: Seats
    new: NewRows
    seat_numbers: list[int]
    firsts: list[int]
    starts: list[int]
    counts: list[int]
    kept: list[int] = field(default_factory=list)
    moved: list[int] = field(default_factory=list)

    @classmethod
    def of(
        cls, batch: collections.abc.Sequence[tuple[Sequence, TokenArray]], seats: Seats, new: NewRows
    ) -> PendingChunk:
        counts = [len(tokens) for _, tokens in batch]
        starts = [int(start) for start in np.cumsum([0, *counts[:-1]])]
        firsts = [sequence.position for sequence, _ in batch]
        numbers = seats.take([sequence.window for sequence, _ in batch])
        return cls(seats, new, numbers, firsts, starts, counts, [0] * len(counts), [0] * len(counts))

    def keep(self, number: int, stop: int) -> None:
        """Sequence `number` keeps its first `stop` new tokens. The sequence's seat is updated before the seat is next
        read.
        """
        self.kept[number] = stop
        self.seats.follow(self)

    def keep_all(self) -> None:
        self.kept = list(self.counts)
        self.seats.follow(self)

    @torch.inference_mode()
    def leave_rows(self) -> None:
        """Copy rows that may still be kept to other memory, because the next call overwrites the memory of the new
        rows.
        """
        if self.kept != self.counts:
            self.new = self.new.copied(self.starts[-1] + self.counts[-1])

    @torch.inference_mode()
    def settle(self) -> None:
        """Update rings, overlap states and tails with the kept tokens. Never waits for the GPU."""
        going = [n for n in range(len(self.counts)) if self.kept[n] > self.moved[n]]
        if not going:
            return
        self._move_rings(going)
        for rows, new in zip(_kinds(self.seats), self.new.kinds, strict=True):
            if rows.layers:
                ratio = rows.tails.shape[3]
                if rows.overlaps is not None:
                    self._move_overlaps(going, rows, new, ratio)
                self._move_tails(going, rows, new, ratio)
        self.moved = list(self.kept)

    def _span(self, number: int) -> tuple[int, int, int]:
        """The rows [begin, end) that a sequence keeps now, and the sequence's position at the first of these rows."""
        begin = self.starts[number] + self.moved[number]
        return begin, self.starts[number] + self.kept[number], self.firsts[number] + self.moved[number]

    def _move_rings(self, going: list[int]) -> None:
        window = self.seats.layout.geometry.window
        sources, targets = [], []
        for number in going:
            begin, end, position = self._span(number)
            late = max(end - begin - window, 0)
            rows = np.arange(begin + late, end)
            slots = self.seat_numbers[number] * 2 * window + (position + late + np.arange(len(rows))) % window
            sources += [rows, rows]
            targets += [slots, slots + window]
        source, target = self._both(sources, targets)
        self.seats.rings.index_copy_(1, target, self.new.window.index_select(1, source))

    def _move_tails(self, going: list[int], rows: CompressorRows, new: Tensor, ratio: int) -> None:
        """Copy the new rows of the last kept token's group into the tail."""
        sources, targets = [], []
        for number in going:
            begin, end, position = self._span(number)
            last = position + end - begin
            late = max(last - last % ratio - position, 0)
            kept = np.arange(begin + late, end)
            places = self.seat_numbers[number] * 2 * ratio + (position + late + np.arange(len(kept))) % ratio
            sources += [kept, kept + new.shape[2]]
            targets += [places, places + ratio]
        source, target = self._both(sources, targets)
        if len(source):
            rows.tails.flatten(1, 3).index_copy_(1, target, new.flatten(1, 2).index_select(1, source))

    def _move_overlaps(self, going: list[int], rows: CompressorRows, new: Tensor, ratio: int) -> None:
        """Copy the Ca rows of the last group that kept tokens have closed: first from the tail, then from new rows."""
        overlaps, width = cast(Tensor, rows.overlaps), cast(Tensor, rows.overlaps).shape[-1]
        # View the tails of all seats and all new rows as one list of rows.
        num_tails = rows.tails.shape[1] * 2 * ratio
        sources, targets = [], []
        for number in going:
            begin, end, position = self._span(number)
            last = position + end - begin
            if last // ratio == position // ratio:
                continue
            places = np.arange(last // ratio * ratio - ratio, last // ratio * ratio)
            seat = self.seat_numbers[number]
            for half in range(2):
                old = (seat * 2 + half) * ratio + places % ratio
                fresh = num_tails + half * new.shape[2] + self.starts[number] + places - self.firsts[number]
                sources.append(np.where(places < self.firsts[number], old, fresh))
                targets.append((half * rows.tails.shape[1] + seat) * ratio + np.arange(ratio))
        if not sources:
            return
        source, target = self._both(sources, targets)
        is_new = (source >= num_tails).view(1, -1, 1)
        tails = rows.tails.flatten(1, 3).index_select(1, source.clamp(max=num_tails - 1))
        fresh_rows = new.flatten(1, 2).index_select(1, (source - num_tails).clamp(min=0))
        picked = torch.where(is_new, fresh_rows, tails)[..., :width]
        overlaps.flatten(1, 3).index_copy_(1, target, picked)

    def _both(self, sources: list[Any], targets: list[Any]) -> tuple[Tensor, Tensor]:
        both = np.stack((np.concatenate(sources), np.concatenate(targets))).astype(np.int64)
        source, target = upload(both, self.seats.rings.device)
        return source, target
