"""Window state: what a sequence needs in addition to its blocks to continue. Depends on position; small, short-lived.

Bytes of a state at position P (all numbers little-endian; floats are float32, float64 for the FLOAT64 format):

    part      for each         what, in order                                        size
    window    layer            the last n_win tokens' entry records, oldest first    n_win records
    overlap   CSA layer        kv [m, c], gate [m, c], indexer kv [m, c_I], gate     2 * m * (c + c_I) floats
    tails     CSA, HCA layer   kv [r, S], gate [r, S]; CSA: the indexer's likewise   2 * r * S floats, r = P mod ratio

    draft     if there is one     number of the first entry's position, u64; the n_win entry records before
                                  position P - 1, oldest first; the last token's streams [M, D]    8 + n_win records
                                  + 4 * M * D: float32 in any format

S is c for HCA, 2 c (2 c_I) for CSA. Gates include the position bias. Before token n_win the oldest records are zeros;
before the first closed group the overlap's kv is 0 and its gate -inf. At a block boundary tails are empty and the size
is `layout.checkpoint_bytes`. The oldest of the n_win window entries is never read again, because a query sees only the
n_win - 1 tokens before its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from antefix.errors import BlockCorrupt, BlockUnusable, InternalError
from antefix.layout import BlockLayout, KVFormat, LayerKind
from antefix.model.attend import advance_ring
from antefix.model.finite import MAGNITUDE_MAX, are_usable_windows, is_usable
from antefix.model.host_rows import upload
from antefix.model.quant import entry_bytes, pack_entries, unpack_entries, value_dtype

_FIRST_BYTES = 8


@dataclass(slots=True)
class CompressorState:
    """One compressor's state between calls.

    tail: [2, ratio, S] kv and gate of the tokens in the unfinished group; rows from `position % ratio` on mean nothing.
    overlap: [2, m, C] the Ca rows of the last complete group; None for HCA.
    """

    tail: Tensor
    overlap: Tensor | None

    def clone(self) -> CompressorState:
        return CompressorState(self.tail.clone(), None if self.overlap is None else self.overlap.clone())


@dataclass(slots=True)
class DraftState:
    """The state of the draft layer (`antefix.model.draft`).

    ring: [n_win, c] the draft layer's window KV; the entry of position p lies in slot p mod n_win. first, end: the
    state has entries of positions [first, end), of which the last n_win are kept. streams: [M * D] or [M, D] of the
    token at `end`; None: they have been used.
    """

    ring: Tensor
    first: int
    end: int
    streams: Tensor | None

    @classmethod
    def empty(cls, layout: BlockLayout, position: int, device: str | torch.device = "cpu") -> DraftState:
        """A draft state without entries: tokens before `position` are unknown."""
        shape = (layout.geometry.window, layout.geometry.head_dim)
        ring = torch.zeros(shape, dtype=value_dtype(layout.kv_format), device=device)
        return cls(ring, position, position, None)

    def is_at(self, position: int) -> bool:
        """Whether this is the state of a sequence of `position` tokens."""
        return self.streams is not None and self.end == position - 1

    def take(self, entries_TC: Tensor) -> None:
        """Add the entries of the next positions."""
        advance_ring(self.ring, entries_TC, self.end)
        self.end += len(entries_TC)

    def clone(self) -> DraftState:
        return DraftState(
            self.ring.clone(), self.first, self.end, None if self.streams is None else self.streams.clone()
        )

    @staticmethod
    def fixed_bytes(layout: BlockLayout) -> int:
        """How many bytes a draft state takes without its streams."""
        return _FIRST_BYTES + layout.window_bytes // layout.geometry.num_layers

    def pieces(self, layout: BlockLayout) -> list[Tensor]:
        """The draft state's bytes, in the order of the table above. The draft state must belong to some position
        (`is_at`).
        """
        assert self.streams is not None
        first = torch.tensor([self.first], dtype=torch.int64, device=self.ring.device)
        records = pack_entries(self.ring.roll(-(self.end % layout.geometry.window), dims=0), layout)
        return [first.view(torch.uint8), records, self.streams.float().contiguous().view(torch.uint8)]

    @classmethod
    def from_bytes(cls, layout: BlockLayout, position: int, data: bytes | memoryview, raw: Tensor) -> DraftState:
        """The draft state of a sequence of `position` tokens. raw: the bytes of `data` on the device.

        Raises:  BlockCorrupt: the state's first position is impossible.
        """
        window, records_end = layout.geometry.window, cls.fixed_bytes(layout)
        first = int.from_bytes(data[:_FIRST_BYTES], "little", signed=True)
        if not 0 <= first < position:
            raise BlockCorrupt(
                f"the window state of a draft module is damaged: at position {position} it cannot begin at {first}"
            )
        records = raw[_FIRST_BYTES:records_end].clone().view(window, -1)
        ring = unpack_entries(records, layout).roll((position - 1) % window, dims=0)
        return cls(ring, first, position - 1, raw[records_end:].clone().view(torch.float32))


class Seat(Protocol):
    """The place of a window state on a GPU while decode steps run it (`antefix.model.seats`)."""

    def copy_out(self, state: WindowState) -> None:
        """Copy the values of the seat to an empty window state."""

    def leave(self) -> None:
        """Free the seat for another window state."""


class WindowState:
    """Decoded window state of one sequence after `position` tokens.

    window: [L, n_win, c]; the token at position p lies in slot p mod n_win.
    main, indexer: compressor states by layer.
    seat: after a decode step on a GPU, the place of the three fields above. Reading one of these fields moves all of
        them out of the seat, so the reader may change them in place. draft: the draft state of a model that drafts; it
        affects speed, never an answer. cut: windows do not attend to tokens before this position, which is 0 except
        during a bounded replay. The cut is not part of the bytes, because n_win tokens later it has no effect.
    """

    def __init__(self, layout: BlockLayout, position: int = 0, device: str | torch.device = "cpu") -> None:
        if position < 0:
            raise InternalError(f"the position of a window state must not be negative, is {position}")
        self.layout = layout
        self.position = position
        self.cut = 0
        self.draft: DraftState | None = None
        self._seat: Seat | None = None
        self._fill_empty(device)

    def _fill_empty(self, device: str | torch.device) -> None:
        geometry = self.layout.geometry
        dtype = value_dtype(self.layout.kv_format)
        self._window = torch.zeros(geometry.num_layers, geometry.window, geometry.head_dim, dtype=dtype, device=device)
        csa = [layer for layer, kind in enumerate(geometry.layers) if kind is LayerKind.CSA]
        hca = [layer for layer, kind in enumerate(geometry.layers) if kind is LayerKind.HCA]
        # One array for all layers of a kind: on a GPU, an array per layer takes a launch per layer.
        tails = self._window.new_zeros(len(hca), 2, geometry.hca_ratio, geometry.head_dim)
        main = _empty_csa(csa, geometry.csa_ratio, geometry.head_dim, self._window)
        main |= {layer: CompressorState(tail, None) for layer, tail in zip(hca, tails, strict=True)}
        self._main: dict[int, CompressorState] = dict(sorted(main.items()))
        self._indexer: dict[int, CompressorState] = _empty_csa(
            csa, geometry.csa_ratio, geometry.indexer_dim, self._window
        )

    @property
    def window(self) -> Tensor:
        self._move_out()
        return self._window

    @window.setter
    def window(self, values: Tensor) -> None:
        self._move_out()
        self._window = values

    @property
    def main(self) -> dict[int, CompressorState]:
        self._move_out()
        return self._main

    @property
    def indexer(self) -> dict[int, CompressorState]:
        self._move_out()
        return self._indexer

    @property
    def seat(self) -> Seat | None:
        return self._seat

    def take_seat(self, seat: Seat) -> None:
        """From now on, the state's values lie in this seat."""
        self._seat = seat
        self._window, self._main, self._indexer = self._window.new_empty(0), {}, {}

    def _move_out(self) -> None:
        if self._seat is None:
            return
        seat, self._seat = self._seat, None
        self._fill_empty(self._window.device)
        seat.copy_out(self)
        seat.leave()

    @classmethod
    def zeros(cls, layout: BlockLayout, position: int, device: str | torch.device = "cpu") -> WindowState:
        """An empty window state at a position: for the start of a sequence (0) or of an exact replay (a block
        boundary).
        """
        return cls(layout, position, device)

    @classmethod
    def cut_at(cls, layout: BlockLayout, position: int, device: str | torch.device = "cpu") -> WindowState:
        """A window state for the start of a bounded replay: as if the sequence began here, but with its true position
        and global KV.
        """
        state = cls(layout, position, device)
        state.cut = position
        return state

    def clone(self) -> WindowState:
        """An independent copy of the state, for two continuations of one prompt."""
        if self._seat is not None:
            copy = WindowState(self.layout, self.position, self._window.device)
            self._seat.copy_out(copy)
        else:
            copy = object.__new__(WindowState)
            copy.layout, copy.position, copy._seat = self.layout, self.position, None
            copy._window = self._window.clone()
            copy._main = {layer: state.clone() for layer, state in self._main.items()}
            copy._indexer = {layer: state.clone() for layer, state in self._indexer.items()}
        copy.cut = self.cut
        copy.draft = None if self.draft is None else self.draft.clone()
        return copy

    def to_bytes(self) -> bytes:
        """The state's bytes (table above). Equal states give equal bytes."""
        if self._seat is not None:
            return self.clone().to_bytes()
        oldest_first = self.window.roll(-(self.position % self.layout.geometry.window), dims=1)
        pieces = [pack_entries(oldest_first, self.layout)]
        pieces += [piece.contiguous().view(torch.uint8) for piece in self._float_pieces()]
        if self.draft is not None and self.draft.is_at(self.position):
            pieces += self.draft.pieces(self.layout)
        # Joined on the device, so that only one copy waits for a GPU.
        return torch.cat([piece.flatten() for piece in pieces]).cpu().numpy().tobytes()

    @classmethod
    def from_bytes(
        cls,
        layout: BlockLayout,
        position: int,
        data: bytes | memoryview,
        device: str | torch.device = "cpu",
        *,
        num_stream_values: int = 0,
    ) -> WindowState:
        """The state that `to_bytes` wrote at `position`.

        num_stream_values: M * D of the model, the number of values in a draft state's streams; 0 allows any number.

        Raises:  BlockCorrupt: the number of bytes is not that of a state at this position, with or without a draft
            state. BlockUnusable: it holds NaN, infinity or numbers beyond the limit (`finite.py`).
        """
        nbytes = state_bytes(layout, position)
        more = len(data) - nbytes - DraftState.fixed_bytes(layout)
        if len(data) != nbytes and (more <= 0 or more % 4 or more != 4 * (num_stream_values or more // 4)):
            raise BlockCorrupt(f"window state at position {position} always has {nbytes} bytes, not {len(data)}")
        is_card = torch.device(device).type != "cpu"
        if is_card and not _are_plainly_usable(layout, position, data):
            # Values on a GPU are never looked at here: the caller would wait for all work that the GPU has to do.
            cls.from_bytes(layout, position, data, num_stream_values=num_stream_values)
        state = cls(layout, position, device)
        raw = upload(np.frombuffer(bytearray(data), np.uint8), torch.device(device))
        num_layers, window = layout.geometry.num_layers, layout.geometry.window
        records = raw[: layout.window_bytes].view(num_layers, window, entry_bytes(layout))
        state._window = unpack_entries(records, layout).roll(position % window, dims=1)
        # The floats may be unaligned; a clone is aligned.
        floats = raw[layout.window_bytes : nbytes].clone().view(value_dtype(layout.kv_format))
        pieces = [piece for piece in state._float_pieces() if piece.numel()]
        given = floats.split([piece.numel() for piece in pieces])
        if pieces:
            torch._foreach_copy_(pieces, [part.view(each.shape) for part, each in zip(given, pieces, strict=True)])
        if nbytes < len(raw):
            state.draft = DraftState.from_bytes(layout, position, data[nbytes:], raw[nbytes:])
        if not is_card and not state.is_usable:
            raise BlockUnusable(
                f"window state at position {position} holds NaN, infinity or numbers that are too large"
            )
        return state

    @property
    def is_usable(self) -> bool:
        """Whether all values of the window state are numbers up to the limit (`finite.py`)."""
        if self._seat is not None:
            return self.clone().is_usable
        draft = () if self.draft is None else (self.draft.ring, self.draft.streams)
        floats = tuple(self._float_pieces())
        # Each piece holds values, then gates. The gates of a group without tokens are minus infinity, which is allowed.
        values, gates = [piece[0] for piece in floats], [piece[1] for piece in floats]
        return all(is_usable(part) for part in (self.window, *values, *draft)) and all(
            is_usable(part.clamp(min=-MAGNITUDE_MAX)) for part in gates
        )

    def _float_pieces(self) -> Iterator[Tensor]:
        """Views of overlap states and live tail rows, in byte order."""
        for layer, main in self.main.items():
            if main.overlap is not None and self.indexer[layer].overlap is not None:
                yield main.overlap
                yield self.indexer[layer].overlap  # type: ignore[misc]
        for layer, kind in enumerate(self.layout.geometry.layers):
            if kind is LayerKind.WINDOW:
                continue
            count = self.position % self.layout.geometry.ratio(layer)
            yield self.main[layer].tail[:, :count]
            if kind is LayerKind.CSA:
                yield self.indexer[layer].tail[:, :count]


@dataclass(frozen=True, slots=True)
class TableArray:
    """A block table [B] int64, and its smallest and largest id."""

    ids: np.ndarray[tuple[int], np.dtype[np.int64]]
    smallest: int
    largest: int


@dataclass(slots=True)
class Sequence:
    """A sequence as `forward` needs it: its blocks of global KV in order, and the window state at its end.

    block_table: pool ids; block i holds tokens [i * block_size, (i + 1) * block_size). The block table must reach the
    last token that is to be computed; the last block may be unfinished.
    """

    block_table: list[int]
    window: WindowState
    # The block table that was converted last, and what it became.
    _converted: tuple[list[int], TableArray] | None = field(default=None, init=False, repr=False, compare=False)

    @property
    def table(self) -> TableArray:
        """The block table as an array, with its smallest and largest id. Made once per change of the table."""
        if self._converted is None or self._converted[0] != self.block_table:
            ids = self.block_table.copy()
            self._converted = ids, TableArray(np.array(ids, np.int64), min(ids, default=0), max(ids, default=0))
        return self._converted[1]

    @property
    def position(self) -> int:
        """How many tokens the sequence has so far."""
        return self.window.position


def state_bytes(layout: BlockLayout, position: int) -> int:
    """Bytes of a window state at `position`; `layout.checkpoint_bytes` at block boundaries."""
    geometry = layout.geometry
    floats = 0
    for layer, kind in enumerate(geometry.layers):
        if kind is LayerKind.WINDOW:
            continue
        series = geometry.head_dim if kind is LayerKind.HCA else 2 * (geometry.head_dim + geometry.indexer_dim)
        floats += 2 * (position % geometry.ratio(layer)) * series
    return layout.checkpoint_bytes + floats * layout.kv_format.float_bytes


def _empty_csa(layers: list[int], ratio: int, width: int, like: Tensor) -> dict[int, CompressorState]:
    if not layers:
        return {}
    tails = like.new_zeros(len(layers), 2, ratio, 2 * width)
    overlaps = like.new_zeros(len(layers), 2, ratio, width)
    overlaps[:, 1] = float("-inf")
    return {layer: CompressorState(*rows) for layer, *rows in zip(layers, tails, overlaps, strict=True)}


def _are_plainly_usable(layout: BlockLayout, position: int, data: bytes | memoryview) -> bool:
    """Whether the packed bytes of a state hold only numbers up to the limit, without minus infinity. False only means
    that the values have to be looked at one by one.
    """
    window, record = layout.geometry.window, entry_bytes(layout)
    dtype = np.dtype("<f8" if layout.kv_format is KVFormat.FLOAT64 else "<f4")
    raw, end = np.frombuffer(data, np.uint8), state_bytes(layout, position)
    records, floats = [raw[: layout.window_bytes]], [raw[layout.window_bytes : end].view(dtype)]
    if end < len(raw):
        first = end + _FIRST_BYTES
        records.append(raw[first : first + window * record])
        floats.append(raw[first + window * record :].view("<f4"))
    in_range = all(low >= -MAGNITUDE_MAX and high <= MAGNITUDE_MAX for low, high in map(_ends, floats))
    return in_range and all(are_usable_windows(each.reshape(-1, record), layout) for each in records)


def _ends(values: np.ndarray[Any, Any]) -> tuple[float, float]:
    """The smallest and the largest value; NaN if there is one."""
    return float(values.min(initial=0)), float(values.max(initial=0))
