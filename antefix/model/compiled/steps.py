"""`antefix.model.steps.Steps` with compiled kernels: no Python code per sequence in a layer.

Shapes:  as in `antefix.model.steps`.
"""

from __future__ import annotations

import collections.abc
from typing import cast

import numpy as np
import torch
from torch import Tensor

from antefix.layout import PartKind
from antefix.model.attention import Attention, CSACompressor
from antefix.model.compiled import attention_kernels, state_kernels
from antefix.model.compiled.attention import Integers, pick, places_of, sizes_of
from antefix.model.compiled.groups import close_groups
from antefix.model.compressor import Compressor
from antefix.model.model import Model
from antefix.model.ops import HCA_SEGMENT
from antefix.model.pool import BlockPool
from antefix.model.quant import round_queries
from antefix.model.steps import Steps, TokenRows
from antefix.model.window_state import Sequence, WindowState


class CompiledSteps(Steps):
    """One forward pass over sequences that run one token each, on a CPU."""

    is_compiled = True

    def __init__(
        self, model: Model, pool: BlockPool, sequences: collections.abc.Sequence[Sequence], write: bool
    ) -> None:
        super().__init__(model, pool, sequences, write)
        self._cuts = np.array([window.cut for window in self._windows], np.int64)
        parts = [_parts(window) for window in self._windows]
        self._table = np.array([[part.data_ptr() for part in each] for each in parts], np.int64)
        self._columns = _columns(self._windows[0])
        self._rings = np.ascontiguousarray(self._table[:, 0])
        self._jobs: list[list[int]] = []
        # The tensors whose addresses the jobs and the table hold.
        self._held = [part for each in parts for part in each]
        self._groups = {ratio: np.array(closing, np.int64) for ratio, closing in self._closing.items()}
        self._numbers = {ratio: np.zeros(len(sequences), np.int64) for ratio in self._closing}
        for ratio, numbers in self._numbers.items():
            numbers[self._groups[ratio]] = np.arange(len(self._groups[ratio]))

    def attend(self, layer: int, attention: Attention, rows: TokenRows) -> Tensor:
        geometry = self._geometry
        self._new_window.append(rows.window.contiguous())
        if rows.compressed is None:
            return self._attend(layer, attention, rows, None, None, 0, 1)
        if rows.index is None:
            self._compress(layer, PartKind.HCA_MAIN, cast(Compressor, attention.compressor), rows.compressed)
            most = (max(self._positions) + 1) // geometry.hca_ratio
            places = places_of(self._pool, self._pool.part(layer, PartKind.HCA_MAIN), self._tables)
            return self._attend(layer, attention, rows, places, None, most, HCA_SEGMENT)
        compressor = cast(CSACompressor, attention.compressor)
        index_rows, queries, weights = rows.index
        self._compress(layer, PartKind.CSA_MAIN, compressor, rows.compressed)
        self._compress(layer, PartKind.INDEXER_KEYS, compressor.indexer, index_rows)
        most, k = (max(self._positions) + 1) // geometry.csa_ratio, compressor.indexer.topk
        if most > k:
            queries = round_queries(queries, self._pool.layout)
        keys = places_of(self._pool, self._pool.part(layer, PartKind.INDEXER_KEYS), self._tables)
        picked = pick(queries, weights, keys, self._visible[geometry.csa_ratio], most, k)
        places = places_of(self._pool, self._pool.part(layer, PartKind.CSA_MAIN), self._tables)
        return self._attend(layer, attention, rows, places, picked, k, k)

    def _attend(
        self,
        layer: int,
        attention: Attention,
        rows: TokenRows,
        places: Integers | None,
        picked: Tensor | None,
        far: int,
        segment: int,
    ) -> Tensor:
        """Attention over the window and over `picked` [S, far] entries, or over all visible ones."""
        geometry, q, new = self._geometry, rows.q.contiguous(), self._new_window[layer]
        made, (num, heads, size) = torch.empty_like(q), q.shape
        sizes = sizes_of(heads, size, geometry.window, far, segment)
        visible = None if places is None else self._visible[geometry.ratio(layer)]
        attention_kernels.attend_rings(
            made.data_ptr(), q.data_ptr(), attention.sinks.data_ptr(), self._rings.ctypes.data,
            layer * geometry.window * geometry.head_dim, new.data_ptr(), self._position.data_ptr(),
            self._cuts.ctypes.data, num, sizes.ctypes.data, 0 if places is None else places.ctypes.data,
            0 if picked is None else picked.data_ptr(), 0 if visible is None else visible.data_ptr(),
        )  # fmt: skip
        return made

    def keep(self, which: collections.abc.Sequence[int]) -> None:
        kept, jobs = np.array(which, np.int64), np.array(self._jobs, np.int64)
        windows = np.array([new.data_ptr() for new in self._new_window], np.int64)
        state_kernels.keep_tokens(
            kept.ctypes.data, len(kept), self._position.data_ptr(), self._table.ctypes.data, self._table.shape[1],
            len(self._windows), jobs.ctypes.data, len(jobs), windows.ctypes.data, len(windows), self._geometry.window,
            self._geometry.head_dim,
        )  # fmt: skip

    def _compress(self, layer: int, kind: PartKind, compressor: Compressor, new: Tensor) -> None:
        new, ratio, columns = new.contiguous(), compressor.ratio, new.shape[2]
        closing, numbers = self._groups[ratio], self._numbers[ratio]
        num, width = len(closing), compressor.width
        tail, overlap = self._columns[kind, layer]
        groups = new.new_empty(2, num, ratio, columns)
        job = [new.data_ptr(), columns, ratio, width, tail, overlap, groups.data_ptr(), num, numbers.ctypes.data]
        self._jobs.append(job)
        self._held += [new, groups]
        if not num:
            return
        overlaps = new.new_empty(2, num, ratio, width) if overlap >= 0 else None
        fields = np.array(job, np.int64)
        state_kernels.gather_groups(
            0 if overlaps is None else overlaps.data_ptr(), fields.ctypes.data, closing.ctypes.data, num,
            self._table.ctypes.data, self._table.shape[1], len(self._windows),
        )  # fmt: skip
        if self._write:
            self._write_groups(layer, kind, compressor, groups, overlaps)

    def _write_groups(
        self, layer: int, kind: PartKind, compressor: Compressor, groups: Tensor, overlaps: Tensor | None
    ) -> None:
        ratio, part = compressor.ratio, self._pool.part(layer, kind)
        closing = self._groups[ratio]
        indices = self._position.numpy()[closing] // ratio
        blocks, places = self._tables.numpy()[closing, indices // part.num_rows], indices % part.num_rows
        angles = self._group_rope(layer, self._closing[ratio], ratio)
        if not close_groups(compressor, groups, overlaps, *angles, self._pool, part, blocks, places):
            super()._write_groups(layer, kind, compressor, groups, overlaps)


def _columns(window: WindowState) -> dict[tuple[PartKind, int], tuple[int, int]]:
    """Which of `_parts` are the tail and the overlap of each compressor (-1: it has no overlap)."""
    columns: dict[tuple[PartKind, int], tuple[int, int]] = {}
    place = 1
    for states, is_keys in ((window.main, False), (window.indexer, True)):
        for layer, state in states.items():
            kind = PartKind.CSA_MAIN if layer in window.indexer else PartKind.HCA_MAIN
            kind = PartKind.INDEXER_KEYS if is_keys else kind
            columns[kind, layer] = place, -1 if state.overlap is None else place + 1
            place += 1 if state.overlap is None else 2
    return columns


def _parts(window: WindowState) -> list[Tensor]:
    """A state's ring, then each compressor's tail and overlap, in the same order for each state."""
    parts = [window.window]
    for states in (window.main, window.indexer):
        for state in states.values():
            parts += [state.tail] if state.overlap is None else [state.tail, state.overlap]
    return parts
