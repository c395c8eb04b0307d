"""`antefix.model.steps.Steps`, with everything between its products compiled: no Python code per sequence in a layer.

Shapes:  as in `antefix.model.steps`; k = far entries of each sequence, in whole segments.
"""

from __future__ import annotations

import collections.abc
from typing import cast

import numpy as np
import torch
from torch import Tensor

from antefix.layout import PartKind
from antefix.model.attention import Attention, CSACompressor
from antefix.model.compiled import attention_kernels as kernels
from antefix.model.compiled.tokens import lanes
from antefix.model.compressor import Compressor
from antefix.model.model import Model
from antefix.model.numerics import multiply_each
from antefix.model.ops import HCA_SEGMENT, KEY_TILE
from antefix.model.pool import BlockPool
from antefix.model.quant import round_queries
from antefix.model.steps import KEYS_TOGETHER_MAX, Steps, TokenRows
from antefix.model.window_state import Sequence


class CompiledSteps(Steps):
    """One forward pass over sequences that run one token each, on a CPU."""

    is_compiled = True

    def __init__(
        self, model: Model, pool: BlockPool, sequences: collections.abc.Sequence[Sequence], write: bool
    ) -> None:
        super().__init__(model, pool, sequences, write)
        self._rings = np.array([window.window.data_ptr() for window in self._windows], np.int64)
        self._cuts = torch.tensor([window.cut for window in self._windows])
        self._none = torch.zeros_like(self._cuts)

    def attend(self, layer: int, attention: Attention, rows: TokenRows) -> Tensor:
        geometry, num = self._geometry, len(self._windows)
        new = rows.window.contiguous()
        self._new_window.append(new)
        ring = new.new_empty(num, geometry.window, geometry.head_dim)
        kernels.gather_rings(
            ring.data_ptr(), self._rings.ctypes.data, layer * geometry.window * geometry.head_dim, new.data_ptr(),
            self._slots.data_ptr(), num, geometry.window, geometry.head_dim,
        )  # fmt: skip
        if rows.compressed is None:
            return self._softmax(attention, rows.q, ring, ring[:, :0], self._none, 1)
        if rows.index is None:
            self._compress(layer, PartKind.HCA_MAIN, cast(Compressor, attention.compressor), rows.compressed)
            visible = self._visible[geometry.hca_ratio]
            entries = self._first_entries(layer, PartKind.HCA_MAIN, visible, HCA_SEGMENT)
            return self._softmax(attention, rows.q, ring, entries, visible, HCA_SEGMENT)
        compressor = cast(CSACompressor, attention.compressor)
        index_rows, queries, weights = rows.index
        self._compress(layer, PartKind.CSA_MAIN, compressor, rows.compressed)
        self._compress(layer, PartKind.INDEXER_KEYS, compressor.indexer, index_rows)
        picked = self._pick(layer, queries, weights, compressor)
        entries = self._read(layer, PartKind.CSA_MAIN, picked)
        live = self._visible[geometry.csa_ratio]
        return self._softmax(attention, rows.q, ring, entries, live, picked.shape[1])

    def _softmax(
        self, attention: Attention, q: Tensor, ring: Tensor, entries: Tensor, live: Tensor, segment: int
    ) -> Tensor:
        """Attention over the ring and the first `live` [S] of the entries [S, k, C], in segments."""
        num, heads, width = q.shape
        window, far = ring.shape[1], entries.shape[1]
        q = q.contiguous()
        near_logits = multiply_each(q, ring.mT).contiguous()
        far_logits = multiply_each(q, entries.mT).contiguous() if far else near_logits
        weights = q.new_empty(num * heads * (2 * window + far + 1))
        kernels.soften(
            weights.data_ptr(), near_logits.data_ptr(), far_logits.data_ptr(), attention.sinks.data_ptr(),
            self._position.data_ptr(), self._cuts.data_ptr(), live.data_ptr(), num, heads, window, far,
        )  # fmt: skip
        weights.exp_()
        size = num * heads * window
        before, own = (weights[i * size : (i + 1) * size].view(num, heads, window) for i in (0, 1))
        values = [multiply_each(before, ring), multiply_each(own, ring)]
        if far:
            parts = weights[2 * size : 2 * size + num * heads * far].view(num, heads, far)
            for start in range(0, far, segment):
                part, held = parts, entries
                if far > segment:
                    part, held = parts[..., start : start + segment].contiguous(), entries[:, start : start + segment]
                values.append(multiply_each(part, held))
        stacked, made = torch.stack(values), torch.empty_like(q)
        kernels.divide(
            made.data_ptr(), stacked.data_ptr(), weights.data_ptr(), num, heads, window, far, segment, width, lanes()
        )
        return made

    def _read(self, layer: int, kind: PartKind, indices: Tensor, rows: slice = slice(None)) -> Tensor:
        part = self._pool.part(layer, kind)
        decoded, tables = self._pool.decoded(part), self._tables[rows]
        num, many = indices.shape
        width = decoded.shape[2]
        out = decoded.new_empty(num, many, width)
        kernels.gather_entries(
            out.data_ptr(), decoded.data_ptr(), decoded.stride(0), part.num_rows, tables.data_ptr(), tables.shape[1],
            indices.data_ptr(), num, many, width,
        )  # fmt: skip
        return out

    def _first_entries(
        self, layer: int, kind: PartKind, visible: Tensor, multiple: int, rows: slice = slice(None)
    ) -> Tensor:
        """The visible entries of each sequence, then zeros up to a multiple of `multiple` that covers every
        sequence.
        """
        part = self._pool.part(layer, kind)
        decoded, tables = self._pool.decoded(part), self._tables[rows]
        most = (max(self._positions) + 1) // self._geometry.ratio(layer)
        num_entries, width = -(-most // multiple) * multiple, decoded.shape[2]
        out = decoded.new_empty(tables.shape[0], num_entries, width)
        kernels.gather_first(
            out.data_ptr(), decoded.data_ptr(), decoded.stride(0), part.num_rows, tables.data_ptr(), tables.shape[1],
            visible[rows].data_ptr(), tables.shape[0], num_entries, width,
        )  # fmt: skip
        return out

    def _pick(self, layer: int, q_SIC: Tensor, weights_SI: Tensor, compressor: CSACompressor) -> Tensor:
        ratio, k = self._geometry.csa_ratio, compressor.indexer.topk
        visible, most = self._visible[ratio], (max(self._positions) + 1) // ratio
        num, heads, _ = q_SIC.shape
        num_keys = -(-most // KEY_TILE) * KEY_TILE
        scores = q_SIC.new_empty(num, num_keys)
        if most > k:
            queries, weights = round_queries(q_SIC, self._pool.layout), weights_SI.contiguous()
            together = max(KEYS_TOGETHER_MAX // num_keys, 1)
            for start in range(0, num, together):
                rows = slice(start, min(start + together, num))
                if rows.stop - rows.start > 1:
                    keys = self._first_entries(layer, PartKind.INDEXER_KEYS, visible, KEY_TILE, rows)
                else:
                    keys = self._keys(layer, rows, num_keys, 1)
                hits = multiply_each(queries[rows], keys.mT).contiguous()
                kernels.score(
                    scores[rows].data_ptr(), hits.data_ptr(), weights[rows].data_ptr(), hits.shape[0], heads, num_keys,
                    num_keys, 0,
                )  # fmt: skip
        picked = torch.empty((num, k), dtype=torch.long)
        kernels.choose(picked.data_ptr(), scores.data_ptr(), visible.data_ptr(), num, num_keys, k)
        return picked
