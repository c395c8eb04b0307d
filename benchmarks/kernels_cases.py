"""The cases of benchmarks.kernels: each kernel and shape's operands, minimal bytes and operations, and baselines.

Bytes count each input read once and each output written once, and only rows that the operation touches. A multiply-add
counts as two operations. A case rotates several operand sets, so that the kernel reads the GPU's memory and not its
50 MB cache. If a case's data is larger than the cache, one set is enough.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

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
from benchmarks import kernels_eager as eager

DEVICE = "cuda"
CACHE_BYTES = 50 << 20
BLOCK_TOKENS = 128
ENTRY, KEY, DIM, ROPE, INDEX_DIM, INDEX_HEADS, WINDOW = 584, 68, 512, 64, 128, 64, 128
MODELS = {"flash": (64, 512), "pro": (128, 1024)}  # heads, top-k
CONTEXTS = {"8K": 8 << 10, "64K": 64 << 10, "256K": 256 << 10, "1M": 1 << 20}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """calls: one callable per operand set. eager: the same work in torch, or None. eager_scale: the case's work divided
    by the eager call's work (torch runs only a slice if the whole case does not fit in memory).
    """

    kernel: str
    shape: str
    calls: list[Callable[[], object]]
    num_bytes: int
    num_flops: int
    eager: Callable[[], object] | None = None
    eager_scale: float = 1.0


def _sets(num_bytes: int) -> int:
    return max(1, min(8, -(-3 * CACHE_BYTES // max(num_bytes, 1))))


def _pool(num_blocks: int, entries: int, nbytes: int) -> Tensor:
    """A part of a pool with random valid records. The blocks are as far apart in memory as in V4-Flash's pool, where
    other parts lie between them.
    """
    gap = 4096
    rows = torch.zeros(num_blocks, entries * nbytes + gap, dtype=torch.uint8, device=DEVICE)
    records = rows[:, : entries * nbytes].unflatten(1, (entries, nbytes))
    if nbytes == KEY:
        rows.random_(256)
        records[..., INDEX_DIM // 2 :] = torch.randint(124, 130, (num_blocks, entries, 4), device=DEVICE).byte()
        return records
    for start in range(0, num_blocks, 4096):
        part = records[start : start + 4096]
        values = torch.randn(part.shape[0] * entries, DIM, device=DEVICE)
        slots = torch.arange(len(values), dtype=torch.int32, device=DEVICE)
        pack.pack_entries(values, ROPE, pack.Target(records=part, slots=slots))
    return records


def _tables(sequences: int, blocks: int) -> Tensor:
    return torch.randperm(sequences * blocks, device=DEVICE).int().view(sequences, blocks)


def _norm(rows: int, dim: int) -> pack.Norm:
    angle = torch.rand(rows, ROPE // 2, device=DEVICE)
    return pack.Norm(weight=torch.rand(dim, device=DEVICE) + 0.5, cos=angle.cos(), sin=angle.sin(), eps=1e-6)


def _eager_pack(kind: str, kv: Tensor, gate: Tensor, bias: Tensor, norm: pack.Norm) -> Tensor:
    x = eager.pool_hca(kv, gate, bias) if kind == "pack_hca" else eager.pool_csa(kv, gate, bias)
    return eager.pack_entries(eager.norm_rope(x, norm.weight, norm.cos, norm.sin), ROPE)


def pack_cases(tokens: int, name: str) -> Iterator[Case]:
    """Compress a whole chunk of `tokens` tokens of one layer. Projections are in float32, as in the released code."""
    for kind, dim, m in (("pack_csa", DIM, 4), ("pack_keys", INDEX_DIM, 4), ("pack_hca", DIM, 128)):
        width = dim if kind == "pack_hca" else 2 * dim
        groups = tokens // m
        nbytes = KEY if kind == "pack_keys" else ENTRY
        moved = tokens * width * 4 * 2 + groups * (nbytes + ROPE * 4 + 8)
        sets = _sets(moved)
        first = torch.arange(groups, dtype=torch.int32, device=DEVICE) * m
        overlap = pack.Overlap(
            prior_rows=first - m,
            kv=torch.zeros(m, m, dim, device=DEVICE),
            gate=torch.full((m, m, dim), float("-inf"), device=DEVICE),
        )
        bias, norm = torch.randn(m, width, device=DEVICE), _norm(groups, dim)
        calls: list[Callable[[], object]] = []
        for _ in range(sets):
            kv, gate = torch.randn(tokens, width, device=DEVICE), torch.randn(tokens, width, device=DEVICE)
            records = torch.zeros(groups, 1, nbytes, dtype=torch.uint8, device=DEVICE)
            target = pack.Target(records=records, slots=torch.randperm(groups, device=DEVICE).int())
            if kind == "pack_hca":
                calls.append(partial(pack.pack_hca, kv, gate, bias, first, norm, target))
            else:
                packer = pack.pack_keys if kind == "pack_keys" else pack.pack_csa
                calls.append(partial(packer, kv, gate, bias, first, overlap, norm, target))

        yield Case(
            kernel=kind, shape=name, calls=calls, num_bytes=moved, num_flops=10 * tokens * width,
            eager=None if kind == "pack_keys" else partial(_eager_pack, kind, kv, gate, bias, norm),
        )  # fmt: skip


def row_cases(tokens: int, name: str) -> Iterator[Case]:
    """Packing a chunk's window entries, unpacking as many entries, and copying the records of a ring or a pool.

    Slots are in random order, as in a pool in use. "in order": one after another, as workers pack a chunk's window.
    """
    norm = _norm(tokens, DIM)
    slots = torch.randperm(tokens, device=DEVICE).int()
    straight = torch.arange(tokens, dtype=torch.int32, device=DEVICE)
    moved = tokens * (DIM * 2 + ENTRY + ROPE * 4 + 4)
    rows = [torch.randn(tokens, DIM, device=DEVICE).bfloat16() for _ in range(_sets(moved))]
    pools = [_pool(tokens // 32, 32, ENTRY) for _ in range(_sets(moved))]
    yield Case(
        kernel="window_pack",
        shape=name,
        calls=[
            lambda x=x, p=p: pack.window_pack(x, norm, pack.Target(records=p, slots=slots))
            for x, p in zip(rows, pools, strict=True)
        ],
        num_bytes=moved,
        num_flops=20 * tokens * DIM,
        eager=lambda: eager.pack_entries(eager.norm_rope(rows[0].float(), norm.weight, norm.cos, norm.sin), ROPE),
    )
    yield Case(
        kernel="window_pack",
        shape=f"{name} in order",
        calls=[
            lambda x=x, p=p: pack.window_pack(x, norm, pack.Target(records=p, slots=straight))
            for x, p in zip(rows, pools, strict=True)
        ],
        num_bytes=moved,
        num_flops=20 * tokens * DIM,
    )
    outs = [torch.empty(tokens, DIM, dtype=torch.bfloat16, device=DEVICE) for _ in pools]
    yield Case(
        kernel="unpack_entries",
        shape=name,
        calls=[lambda p=p, o=o: gather.unpack_entries(p, slots, o, ROPE) for p, o in zip(pools, outs, strict=True)],
        num_bytes=tokens * (ENTRY + 2 * DIM + 4),
        num_flops=2 * tokens * DIM,
        eager=lambda: eager.decode_entries(pools[0][slots // 32, slots % 32], DIM, ROPE),
    )
    payload = torch.empty(tokens // 128, 128, ENTRY, dtype=torch.uint8, device=DEVICE)
    yield Case(
        kernel="copy_records",
        shape=name,
        calls=[lambda p=p: gather.copy_records(p, slots, payload, straight) for p in pools],
        num_bytes=tokens * (2 * ENTRY + 8),
        num_flops=0,
        eager=lambda: pools[0][slots // 32, slots % 32],
    )


def indexer_cases(context: int, name: str, model: str, sequences: int, queries: int) -> Iterator[Case]:
    """Scores, top-k, or both, for decode (one query per sequence) or a prefill chunk at the context's end."""
    k = MODELS[model][1]
    size = context // 4
    blocks = size // 32
    total = sequences * queries
    lens = torch.full((sequences, queries), size, dtype=torch.int32, device=DEVICE)
    if queries > 1:
        lens -= (torch.arange(queries, device=DEVICE).flip(0) // 4).int()
    lens = lens.flatten().contiguous()
    sets = _sets(sequences * size * KEY) if queries == 1 else 1
    pools = [_pool(sequences * blocks, 32, KEY) for _ in range(sets)]
    table = _tables(sequences, blocks)
    q = torch.randn(total, INDEX_HEADS, INDEX_DIM, device=DEVICE).bfloat16()
    weights = torch.randn(total, INDEX_HEADS, device=DEVICE)
    query = indexer.prepare_queries(q, weights, 0.01)
    pairs = int(lens.long().sum())
    key_bytes = sequences * size * KEY + total * INDEX_HEADS * (2 * INDEX_DIM + 4)
    flops = 2 * INDEX_HEADS * INDEX_DIM * pairs
    label = f"{name} {model} S={sequences} Q={queries}"
    group = indexer.group_for(size, k)
    scored = [indexer.index_scores(query, p, table, lens, size, group=group) for p in pools]
    if model == "flash":
        yield Case(
            kernel="index_scores",
            shape=label,
            calls=[lambda p=p: indexer.index_scores(query, p, table, lens, size, group=group) for p in pools],
            num_bytes=key_bytes + 4 * pairs,
            num_flops=flops,
        )
    yield Case(
        kernel="topk_entries",
        shape=label,
        calls=[lambda s=s: topk.topk_entries(s, lens, table, 32, k) for s in scored],
        num_bytes=4 * pairs + 8 * total * k,
        num_flops=0,
        eager=lambda: scored[0].scores[:, :size].topk(min(k, size), dim=1),
    )
    levels = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], device=DEVICE)
    levels = torch.cat([levels, -levels]).bfloat16()

    def both(pool: Tensor) -> object:
        fresh = indexer.prepare_queries(q, weights, 0.01)
        return topk.topk_entries(indexer.index_scores(fresh, pool, table, lens, size, group=group), lens, table, 32, k)

    few = sequences if queries == 1 else min(queries, max(1, (1 << 23) // size))
    plain_q = q[:few].view(sequences, -1, INDEX_HEADS, INDEX_DIM)
    plain_weights = weights[:few].view(sequences, -1, INDEX_HEADS)
    yield Case(
        kernel="indexer_topk",
        shape=label,
        calls=[lambda p=p: both(p) for p in pools],
        num_bytes=key_bytes + 8 * total * k,
        num_flops=flops,
        eager=lambda: eager.index_topk(pools[0], table.long(), plain_q, plain_weights, levels, k),
        eager_scale=total / few,
    )


def _attention_operands(total: int, heads: int, sequences: int) -> tuple[Tensor, operands.Window, operands.Heads]:
    q = torch.randn(total, heads, DIM, device=DEVICE).half()
    per_sequence = total // sequences
    rows = WINDOW if per_sequence == 1 else -(-(per_sequence + WINDOW) // 32) * 32
    ring = _pool(-(-sequences * rows // 32), 32, ENTRY)
    ring = ring.flatten(0, 1)[: sequences * rows].contiguous().view(sequences, rows, ENTRY)
    firsts = torch.arange(per_sequence, dtype=torch.int32, device=DEVICE).repeat(sequences)
    if per_sequence == 1:
        firsts = torch.randint(0, WINDOW, (sequences,), device=DEVICE).int()
    counts = torch.full((total,), WINDOW, dtype=torch.int32, device=DEVICE)
    angle = torch.rand(total, ROPE // 2, device=DEVICE)
    return (
        q,
        operands.Window(records=ring, firsts=firsts, counts=counts),
        operands.Heads(sinks=torch.randn(heads, device=DEVICE), scale=DIM**-0.5, cos=angle.cos(), sin=angle.sin()),
    )


def _attend_picked(
    q: Tensor,
    records: Tensor,
    picks: Tensor,
    counts: Tensor,
    window: operands.Window,
    per_head: operands.Heads,
    out: Tensor,
    size: int,
) -> None:
    """Decode reads packed records. In prefill the call first decodes all records once, and picks are entry indices."""
    if len(q) == len(window.records):
        attention.sparse_attention(q, records, picks, counts, window, per_head, out)
        return
    table = torch.arange(len(records), dtype=torch.int32, device=DEVICE).view(1, -1)
    values = prefill.decode_sequences(records, table, size, window.records, ROPE, DIM)
    prefill.prefill_attention(q, values, picks, counts, window, per_head, out)


def _attend_all(
    q: Tensor,
    records: Tensor,
    table: Tensor,
    lens: Tensor,
    size: int,
    window: operands.Window,
    per_head: operands.Heads,
    out: Tensor,
) -> None:
    if len(q) == len(window.records):
        attention.hca_attention(q, records, table, lens, size, window, per_head, out)
        return
    values = prefill.decode_sequences(records, table, size, window.records, ROPE, DIM)
    prefill.prefill_attention(q, values, None, lens, window, per_head, out)


def sparse_cases(context: int, name: str, model: str, sequences: int, queries: int) -> Iterator[Case]:
    """Attention to picked entries and the window, for decode (one query per sequence) or a sequence's prefill chunk."""
    heads, k = MODELS[model]
    total, size = sequences * queries, context // 4
    q, window, per_head = _attention_operands(total, heads, sequences)
    # Different queries seldom pick the same entries in decode; in prefill all entries come from one sequence.
    records = _pool(max(sequences * min(size, 8192), size) // 32, 32, ENTRY)
    span = records.shape[0] * 32 if queries == 1 else size
    touched = total * k if queries == 1 else min(total * k, size)
    window_rows = sequences * WINDOW if queries == 1 else queries + WINDOW
    moved = (touched + window_rows) * ENTRY + total * (heads * DIM * 4 + 4 * k)
    keep = min(k, span)
    choices = [
        torch.stack([torch.randperm(span, device=DEVICE)[:keep].sort().values for _ in range(min(total, 128))])
        .int()
        .repeat(-(-total // 128), 1)[:total]
        .contiguous()
        for _ in range(_sets(moved))
    ]
    outs = torch.empty_like(q, dtype=torch.bfloat16)
    plain_q = q.bfloat16()
    few = min(total, 64)
    picked = torch.full((total,), keep, dtype=torch.int32, device=DEVICE)
    plain_ring = window.records[:few] if queries == 1 else window.records[:, :WINDOW]
    yield Case(
        kernel="sparse_attention",
        shape=f"{name} {model} S={sequences} Q={queries}",
        calls=[partial(_attend_picked, q, records, s, picked, window, per_head, outs, size) for s in choices],
        num_bytes=moved,
        num_flops=4 * total * heads * (keep + WINDOW) * DIM,
        eager=lambda: eager.sparse_attention(
            records, choices[0][:few].long(), plain_ring, plain_q[:few], per_head.sinks, per_head.cos[:few],
            per_head.sin[:few], per_head.scale,
        ),
        eager_scale=total / few,
    )  # fmt: skip


def hca_cases(context: int, name: str, model: str, sequences: int, queries: int) -> Iterator[Case]:
    """Attention to all compressed entries and window, for decode or a prefill chunk at the context's end."""
    heads, _ = MODELS[model]
    total, size = sequences * queries, context // BLOCK_TOKENS
    q, window, per_head = _attention_operands(total, heads, sequences)
    lens = torch.full((sequences, queries), size, dtype=torch.int32, device=DEVICE)
    if queries > 1:
        lens -= (torch.arange(queries, device=DEVICE).flip(0) // BLOCK_TOKENS).int()
    lens = lens.flatten().contiguous()
    window_rows = sequences * WINDOW if queries == 1 else queries + WINDOW
    moved = (sequences * size + window_rows) * ENTRY + total * heads * DIM * 4
    sets = _sets(moved) if queries == 1 else 1
    pools = [_pool(sequences * size, 1, ENTRY) for _ in range(sets)]
    table = _tables(sequences, size)
    outs = torch.empty_like(q, dtype=torch.bfloat16)
    plain_q = q.bfloat16()
    few = min(total, max(1, (1 << 17) // size), 32)
    plain_ring = window.records[:few] if queries == 1 else window.records[:, :WINDOW]
    plain_table = table[:few].long() if queries == 1 else table.expand(few, -1).long()
    yield Case(
        kernel="hca_attention",
        shape=f"{name} {model} S={sequences} Q={queries}",
        calls=[partial(_attend_all, q, p, table, lens, size, window, per_head, outs) for p in pools],
        num_bytes=moved,
        num_flops=4 * heads * DIM * int((lens.long() + WINDOW).sum()),
        eager=lambda: eager.hca_attention(
            pools[0], plain_table, plain_ring, plain_q[:few], per_head.sinks, per_head.cos[:few], per_head.sin[:few],
            per_head.scale,
        ),
        eager_scale=total / few,
    )  # fmt: skip


def all_cases(seed: int, only: str = "") -> Iterator[Case]:
    """Every case whose `kernel shape` matches `only`. A case's operands are freed when the next case is requested."""
    torch.manual_seed(seed)
    makers: list[tuple[str, Callable[[], Iterator[Case]]]] = []
    for name, context in CONTEXTS.items():
        if context <= 256 << 10:
            makers.append((f"pack {name}", partial(pack_cases, context, name)))
            makers.append((f"rows {name}", partial(row_cases, context, name)))
        for model in MODELS:
            for kind, maker, many in (
                ("indexer", indexer_cases, 32),
                ("sparse", sparse_cases, 128),
                ("hca", hca_cases, 32),
            ):
                for sequences, queries in ((1, 1), (many, 1), (1, 2048)):
                    label = f"{kind} {name} {model} S={sequences} Q={queries}"
                    makers.append((label, partial(maker, context, name, model, sequences, queries)))
    for label, make in makers:
        if re.search(only, label):
            yield from make()
