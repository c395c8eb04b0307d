"""The five steps that touch cached KV, on a GPU: Triton kernels on the pool's packed records (FP8 format only).

These operations need no decoded copies, so they work on a CardPool. Attention reads FP16, so its outputs agree with
TorchOps' within about 1e-3. Stored records agree too, except for values that another order of sums moves across a
rounding border.

A query's bits depend on the kernel that computes it and on how its entries are split among programs; both follow from
the number of queries. With `reproducible` all queries use one kernel, unsplit. The single kernel is slower for few
queries, but gives the same bits however a prompt is cut.

Shapes:  as in antefix.model.ops; B = blocks of the sequence.
"""

from __future__ import annotations

import torch
from torch import Tensor

from antefix.errors import InternalError
from antefix.layout import BlockLayout, KVFormat, PartKind
from antefix.model.attend import WindowLine
from antefix.model.compressor import Compressor
from antefix.model.ops import Entries
from antefix.model.quant import entry_bytes
from antefix.model.step_runner import StepRunner
from antefix_kernels import (
    decode_attention as attention,
)
from antefix_kernels import (
    gather,
    operands,
    pack,
    topk,
)
from antefix_kernels import (
    index_scores as indexer,
)
from antefix_kernels import (
    prefill_attention as prefill,
)

# From this many queries on, decoding entries once costs less than decoding them for each query.
PREFILL_QUERIES_MIN = 16
# Fewer queries than this may be rounded by products of another shape. So in reproducible mode at least as many are
# rounded, and one kernel scores them in tiles of one shape: keys, queries per product, warps, stages.
REPRODUCIBLE_QUERIES_MIN = 256
REPRODUCIBLE_TILE = (128, 2, 4, 2)
# Memory limit of index scores; longer chunks are scored in pieces.
SCORES_BYTES_MAX = 1 << 30


class TritonOps:
    """An implementation of `Ops` for CUDA; in Triton's interpreter it runs on a CPU too, slowly.

    reproducible: a query's bits do not depend on what else is computed.
    batched: sequences that run one token each share one launch per layer.  graphs: such steps are recorded and
        replayed.  over_ranks: steps of a model over several ranks are recorded too.  chunks: short calls of several
        tokens per sequence share launches too.
    Raises:  InternalError: a layout of another record format than FP8.
    """

    def __init__(
        self,
        layout: BlockLayout,
        *,
        reproducible: bool = False,
        batched: bool = False,
        graphs: bool = False,
        over_ranks: bool = False,
        chunks: bool = False,
    ) -> None:
        if layout.kv_format is not KVFormat.FP8:
            raise InternalError(f"the Triton kernels can read only fp8 records, not {layout.kv_format.value}")
        self._layout = layout
        self.reproducible = reproducible
        self.steps_together = batched
        self.step_runner: StepRunner | None = None
        if batched:
            self.step_runner = StepRunner(
                reproducible=reproducible, graphs=graphs, over_ranks=over_ranks, chunks=chunks
            )

    def window_pack(self, entries_TC: Tensor, layout: BlockLayout) -> Tensor:
        records = self._pack(entries_TC)
        out = torch.empty(entries_TC.shape, dtype=torch.float32, device=entries_TC.device)
        gather.unpack_entries(records, _count(len(out), out.device), out, layout.geometry.rope_dim)
        return out

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
        _, num_groups, m, series = rows.shape
        kv, gate = (series_rows.reshape(num_groups * m, series) for series_rows in rows)
        first_rows = _count(num_groups, rows.device) * m
        # The rows' gates already contain their position bias.
        bias = torch.zeros(m, series, dtype=torch.float32, device=rows.device)
        norm = pack.Norm(
            weight=compressor.kv_norm.weight.float(),
            cos=cos.float().contiguous(),
            sin=sin.float().contiguous(),
            eps=compressor.kv_norm.eps,
        )
        indices = torch.arange(first, first + num_groups, device=rows.device)
        target = pack.Target(records=to.pool.records(to.part), slots=_slots(to, indices))
        if overlap is None:
            pack.pack_hca(kv, gate, bias, first_rows, norm, target)
            return
        before = first_rows - m
        before[0] = -1
        state_kv, state_gate = overlap.float().unsqueeze(1).contiguous()
        state = pack.Overlap(prior_rows=before, kv=state_kv, gate=state_gate)
        packer = pack.pack_keys if to.part.kind is PartKind.INDEXER_KEYS else pack.pack_csa
        packer(kv, gate, bias, first_rows, state, norm, target)

    def indexer_topk(self, q_TIC: Tensor, weights_TI: Tensor, keys: Entries, num_visible_T: Tensor, k: int) -> Tensor:
        records, table = keys.pool.records(keys.part), _table(keys)
        num_entries_max = table.shape[1] * records.shape[1]
        lens = num_visible_T.int()
        group = indexer.group_for(num_entries_max, k)
        picked = []
        step = max(1, SCORES_BYTES_MAX // (4 * max(num_entries_max, 1)))
        for start in range(0, len(lens), step):
            rows = slice(start, start + step)
            visible = lens[rows]
            num_queries = len(visible)
            query = self._index_query(q_TIC[rows], weights_TI[rows].float())
            if len(query.codes) > num_queries:
                visible = torch.cat((visible, visible[-1:]))
            tile = REPRODUCIBLE_TILE if self.reproducible else None
            scored = indexer.index_scores(query, records, table, visible, num_entries_max, group=group, tile=tile)
            picks = topk.topk_entries(scored, visible, table, records.shape[1], k)
            picked.append(picks.indices[:num_queries])
        return torch.cat(picked).long()

    def sparse_attention(
        self, q_THC: Tensor, window: WindowLine, sinks_H: Tensor, entries: Entries, picked_Tk: Tensor
    ) -> Tensor:
        line, heads, out = self._window(window), self._heads(q_THC, sinks_H), _output(q_THC)
        records, q = entries.pool.records(entries.part), q_THC.half()
        num_picked = (picked_Tk >= 0).sum(1).int()
        if len(q) >= PREFILL_QUERIES_MIN:
            values = self._decoded(entries, line)
            prefill.prefill_attention(q, values, picked_Tk.int().contiguous(), num_picked, line, heads, out)
            return out.to(q_THC.dtype)
        slots = _slots(entries, picked_Tk.clamp(min=0))
        if self.reproducible:
            # Run the prefill kernel over a copy of the picked entries alone.
            geometry = self._layout.geometry
            values = prefill.decode_slots(records, slots.flatten(), line.records, geometry.rope_dim, geometry.head_dim)
            places = _count(slots.numel(), slots.device).view(slots.shape)
            prefill.prefill_attention(q, values, places, num_picked, line, heads, out)
        else:
            attention.sparse_attention(q, records, slots, num_picked, line, heads, out)
        return out.to(q_THC.dtype)

    def full_attention(
        self, q_THC: Tensor, window: WindowLine, sinks_H: Tensor, entries: Entries | None, num_visible_T: Tensor
    ) -> Tensor:
        q, line, heads, out = q_THC.half(), self._window(window), self._heads(q_THC, sinks_H), _output(q_THC)
        lens = num_visible_T.int() if entries is not None else torch.zeros_like(num_visible_T, dtype=torch.int32)
        if self.reproducible or len(q) >= PREFILL_QUERIES_MIN:
            prefill.prefill_attention(q, self._decoded(entries, line), None, lens, line, heads, out)
        elif entries is None:
            # No entry is picked here, so it does not matter which records and slots are passed.
            attention.sparse_attention(q, line.records, lens.unsqueeze(1), lens, line, heads, out)
        else:
            records, table = entries.pool.records(entries.part), _table(entries)
            num_entries_max = table.shape[1] * records.shape[1]
            attention.hca_attention(q, records, table, lens, num_entries_max, line, heads, out)
        return out.to(q_THC.dtype)

    def _index_query(self, q_TIC: Tensor, weights_TI: Tensor) -> indexer.IndexQuery:
        """Rounded queries. In reproducible mode a single query is doubled, because alone it would use another
        kernel.
        """
        if not self.reproducible:
            return indexer.prepare_queries(q_TIC.contiguous(), weights_TI.contiguous(), 1.0)
        q, weights = (fill_rows(x, REPRODUCIBLE_QUERIES_MIN) for x in (q_TIC, weights_TI))
        query = indexer.prepare_queries(q.contiguous(), weights.contiguous(), 1.0)
        num_scored = max(len(q_TIC), 2)
        return indexer.IndexQuery(codes=query.codes[:num_scored], weights=query.weights[:num_scored])

    def _pack(self, entries_TC: Tensor, num_records: int | None = None) -> Tensor:
        """Records [1, T, R] of entries, followed by zero bytes up to `num_records` records."""
        rows = entries_TC.float().contiguous()
        make = torch.empty if num_records is None else torch.zeros
        shape = (1, num_records or len(rows), entry_bytes(self._layout))
        records = make(shape, dtype=torch.uint8, device=rows.device)
        target = pack.Target(records=records, slots=_count(len(rows), rows.device))
        pack.pack_entries(rows, self._layout.geometry.rope_dim, target)
        return records

    def _window(self, line: WindowLine) -> operands.Window:
        """The chunk's window line as records, which hold its values exactly, and each query's part of it."""
        window = line.values.shape[1]
        device = line.values.device
        own = _count(line.num_tokens, device)
        counts = (own + (line.position + 1 - line.cut)).clamp(max=window)
        last = own + (window + line.position % window)
        # Kernels are compiled per number of rows. Rounding it up to powers of two keeps these numbers few.
        rows = line.values.flatten(0, 1)
        records = self._pack(rows, 1 << (len(rows) - 1).bit_length())
        return operands.Window(records=records, firsts=last - counts + 1, counts=counts)

    def _heads(self, q_THC: Tensor, sinks_H: Tensor) -> operands.Heads:
        """Queries are scaled already, and the model itself rotates outputs back."""
        shape = (len(q_THC), self._layout.geometry.rope_dim // 2)
        ones, zeros = torch.ones(shape, device=q_THC.device), torch.zeros(shape, device=q_THC.device)
        return operands.Heads(sinks=sinks_H.float(), scale=1.0, cos=ones, sin=zeros)

    def _decoded(self, entries: Entries | None, line: operands.Window) -> Tensor:
        """The sequence's decoded entries and window rows, or the window rows alone, for the prefill kernel."""
        geometry = self._layout.geometry
        if entries is None:
            none = _count(0, line.records.device)
            return prefill.decode_slots(line.records, none, line.records, geometry.rope_dim, geometry.head_dim)
        records, table = entries.pool.records(entries.part), _table(entries)
        num_entries = table.shape[1] * records.shape[1]
        return prefill.decode_sequences(records, table, num_entries, line.records, geometry.rope_dim, geometry.head_dim)


def _count(num: int, device: torch.device) -> Tensor:
    return torch.arange(num, dtype=torch.int32, device=device)


def _output(q_THC: Tensor) -> Tensor:
    """Kernels round float32 to BF16 as torch does. Rounding in a later kernel would write and read each number once
    more.
    """
    dtype = q_THC.dtype if q_THC.dtype is torch.bfloat16 else torch.float32
    return torch.empty(q_THC.shape, dtype=dtype, device=q_THC.device)


def _table(entries: Entries) -> Tensor:
    """Block ids [1, B] int32."""
    return entries.block_ids.int().unsqueeze(0)


def _slots(entries: Entries, indices: Tensor) -> Tensor:
    """Pool slots (int32) of entries, given by their index in the sequence."""
    blocks, rows = entries.locate(indices)
    return (blocks * entries.part.num_rows + rows).int()


def fill_rows(x: Tensor, num_rows: int) -> Tensor:
    """x with its last row repeated until there are `num_rows` rows; x itself if it has that many."""
    missing = num_rows - len(x)
    return x if missing <= 0 else torch.cat((x, x[-1:].expand(missing, *x.shape[1:])))
