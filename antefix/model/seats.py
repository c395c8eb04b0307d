"""Window states of decoding sequences on a GPU: one array per kind of state, indexed by a seat number.

A decode step reads and writes the states of its whole batch by seat number, in one launch per layer. A sequence gets a
seat number in its first decode step on a GPU. The sequence keeps the seat until the sequence is dropped, or until its
tensors are asked for (by a prefill chunk or a replay), which moves the state out of the seat. Copying a window state
does not move it out of its seat.

    rings      [L, seats * 2 * n_win, R] uint8    a seat's window records, twice: position p lies in rows p mod n_win
                                                  and n_win + p mod n_win, so any window is one run of rows
    tails      [layers, seats, 2, ratio, S]       kv and gate of the unfinished group's tokens
    overlaps   [layers, 2, seats, m, C]           the last closed group's Ca rows (CSA)

Seat 0 is a dummy: rows that pad a batch write there.
Shapes:  L = layers, R = record bytes, S = width of a compressor's rows, C = entry width, m = CSA ratio.
"""

from __future__ import annotations

import collections.abc
import weakref
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from antefix.layout import BlockLayout, LayerKind
from antefix.model.quant import entry_bytes, pack_entries, unpack_entries
from antefix.model.window_state import CompressorState, WindowState

_SEATS_MIN = 8


@dataclass(slots=True)
class CompressorRows:
    """Memory of one kind of compressor, for all seats. overlaps: None for HCA.  no_bias: [ratio, S] of zeros."""

    layers: tuple[int, ...]
    tails: Tensor
    overlaps: Tensor | None
    no_bias: Tensor

    def grow(self, more: int) -> None:
        self.tails = _longer(self.tails, 1, more)
        if self.overlaps is not None:
            self.overlaps = _longer(self.overlaps, 2, more)

    def put(self, number: int, states: collections.abc.Mapping[int, CompressorState]) -> None:
        """Copy states, given by layer, into seat `number`."""
        given = [states[layer] for layer in self.layers]
        self.tails[:, number] = torch.stack([state.tail for state in given])
        if self.overlaps is not None:
            overlaps = [state.overlap for state in given if state.overlap is not None]
            self.overlaps[:, :, number] = torch.stack(overlaps)

    def take(self, number: int, states: dict[int, CompressorState]) -> None:
        tails = self.tails[:, number].clone()
        overlaps = None if self.overlaps is None else self.overlaps[:, :, number].clone()
        for place, layer in enumerate(self.layers):
            states[layer] = CompressorState(tails[place], None if overlaps is None else overlaps[place])


@dataclass(frozen=True, slots=True)
class CardSeat:
    """The seat of one state. See `window_state.Seat`."""

    seats: Seats
    number: int

    def copy_out(self, state: WindowState) -> None:
        self.seats.copy_out(self.number, state)

    def leave(self) -> None:
        self.seats.leave(self.number)


class Pending(Protocol):
    """Updates by kept tokens that have not been made yet in the tokens' seats (`antefix.model.seated_chunks`)."""

    def settle(self) -> None:
        """Make the updates now."""


class Seats:
    """All seats of one device. FP8 format only. The seats belong to one thread, like the pool.

    generation: increases when the arrays move to other memory.
    """

    def __init__(self, layout: BlockLayout, device: torch.device) -> None:
        geometry = layout.geometry
        self.layout = layout
        self.generation = 0
        self.num_seats = _SEATS_MIN
        # Updates by kept tokens of a call of several tokens that have not been made here yet.
        self._pending: Pending | None = None
        # The state in each seat. The reference is weak: a state that nobody uses any more gives up its seat.
        self._taken: dict[int, weakref.ref[WindowState]] = {}
        rows = self.num_seats * 2 * geometry.window
        self.rings = torch.zeros(geometry.num_layers, rows, entry_bytes(layout), dtype=torch.uint8, device=device)
        csa = tuple(i for i, kind in enumerate(geometry.layers) if kind is LayerKind.CSA)
        hca = tuple(i for i, kind in enumerate(geometry.layers) if kind is LayerKind.HCA)
        self.main = self._csa_rows(csa, geometry.head_dim, device)
        self.indexer = self._csa_rows(csa, geometry.indexer_dim, device)
        tails = torch.zeros(len(hca), self.num_seats, 2, geometry.hca_ratio, geometry.head_dim, device=device)
        self.hca = CompressorRows(hca, tails, None, tails.new_zeros(tails.shape[-2:]))

    def _csa_rows(self, layers: tuple[int, ...], width: int, device: torch.device) -> CompressorRows:
        ratio = self.layout.geometry.csa_ratio
        tails = torch.zeros(len(layers), self.num_seats, 2, ratio, 2 * width, device=device)
        overlaps = torch.zeros(len(layers), 2, self.num_seats, ratio, width, device=device)
        return CompressorRows(layers, tails, overlaps, tails.new_zeros(ratio, 2 * width))

    def take(self, states: collections.abc.Sequence[WindowState]) -> list[int]:
        """The seat numbers of these window states; states without a seat get one."""
        self.settle()
        numbers = [self._number(state) for state in states]
        for place, (state, number) in enumerate(zip(states, numbers, strict=True)):
            if number is None:
                numbers[place] = self._seat(state, {n for n in numbers if n is not None})
        return [number for number in numbers if number is not None]

    def reserve(self, num_states: int) -> None:
        """Make room for this many states, so that the arrays on the GPU need not move later."""
        if self.num_seats <= num_states:
            self._grow(num_states + 1 - self.num_seats)

    def copy_out(self, number: int, state: WindowState) -> None:
        """Copy the values of a seat into a window state that has none."""
        self.settle()
        window = self.layout.geometry.window
        records = self.rings[:, number * 2 * window :][:, :window]
        state.window = unpack_entries(records, self.layout)
        for rows, states in self._kinds(state):
            rows.take(number, states)

    def leave(self, number: int) -> None:
        self._taken.pop(number, None)

    def follow(self, pending: Pending) -> None:
        """Keep updates that must be made before any seat is read."""
        if self._pending is not pending:
            self.settle()
        self._pending = pending

    def settle(self) -> None:
        """Make all remembered updates now."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.settle()

    def _number(self, state: WindowState) -> int | None:
        seat = state.seat
        if isinstance(seat, CardSeat) and seat.seats is self:
            return seat.number
        return None

    def _seat(self, state: WindowState, busy: set[int]) -> int:
        number = self._free(busy)
        window = self.layout.geometry.window
        records = pack_entries(state.window, self.layout)
        self.rings[:, number * 2 * window :][:, : 2 * window] = torch.cat((records, records), 1)
        for rows, states in self._kinds(state):
            rows.put(number, states)
        state.take_seat(CardSeat(self, number))
        self._taken[number] = weakref.ref(state)
        return number

    def _free(self, busy: set[int]) -> int:
        """The number of a seat that no window state has. If all seats are taken, more seats are made."""
        for number in range(1, self.num_seats):
            held = self._taken.get(number)
            if number not in busy and (held is None or held() is None):
                self.leave(number)
                return number
        first = self.num_seats
        self._grow(self.num_seats)
        return first

    def _grow(self, more: int) -> None:
        # First: if memory is short, only some of the arrays move.
        self.generation += 1
        self.rings = _longer(self.rings, 1, more * 2 * self.layout.geometry.window)
        for rows in (self.main, self.indexer, self.hca):
            rows.grow(more)
        self.num_seats += more

    def _kinds(self, state: WindowState) -> list[tuple[CompressorRows, dict[int, CompressorState]]]:
        kinds = [(self.main, state.main), (self.indexer, state.indexer), (self.hca, state.main)]
        return [(rows, states) for rows, states in kinds if rows.layers]


def _longer(array: Tensor, dim: int, more: int) -> Tensor:
    shape = list(array.shape)
    shape[dim] = more
    return torch.cat((array, array.new_zeros(shape)), dim)
