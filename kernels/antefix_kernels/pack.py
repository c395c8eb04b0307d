"""Compresses groups of tokens and rounds them directly to stored records, the bytes that go to disk.

Order of work, as released: gated softmax over a group's rows, RMSNorm, RoPE, (keys: Hadamard), rounding. All arithmetic
is float32; the released code also rounds to BF16 between these steps, which these kernels do not do.

Shapes:  N = rows of projections, c = head dim (main) or indexer dim (keys), m = ratio, G = groups, S = overlap slots,
         P, E, R = blocks, entries per block, record bytes.
Records lie in a pool; slot i is entry i % E of block i // E. A negative slot is skipped.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from antefix_kernels.finish import norm_rope, record_offsets, store_codes, store_entries, store_keys
from antefix_kernels.number_formats import EntryFormat, KeyFormat, byte_alignment, check, check_records
from antefix_kernels.rounding import bf16_bits

# Columns of a group that one program pools where groups are long (HCA), and rows it has in flight.
_POOL_COLUMNS = 64
_POOL_ROWS = 128
_POOL_WARPS = 8
# Rows and warps of one program where rows are packed one by one.
_ROW_TILE = (2, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Norm:
    """RMSNorm and RoPE: weight [c] float32, eps, cos and sin [rows, rope / 2] float32 at each row's position."""

    weight: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    eps: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Where records go: records [P, E, R] uint8, slots [rows] int32 in [0, P * E), or negative to drop the row."""

    records: torch.Tensor
    slots: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Overlap:
    """What precedes each CSA group: prior_rows [G] int32, the first row of the group before, or -1 - s for slot s of
    kv and gate [S, m, c] float32 (the overlap state: gates with their bias added, -inf where nothing came before).
    """

    prior_rows: torch.Tensor
    kv: torch.Tensor
    gate: torch.Tensor


@triton.jit(do_not_specialize=["num_rows", "num_values"])
def _rows_kernel(values, weight, cos, sin, eps, records, slots, num_rows, num_values, stride_n, stride_p,
                 ENTRIES: tl.constexpr, RECORD: tl.constexpr, ALIGN: tl.constexpr, SCALE_OFFSET: tl.constexpr,
                 DIM: tl.constexpr, ROPE: tl.constexpr, D: tl.constexpr, PAIRS: tl.constexpr, ROWS: tl.constexpr,
                 NORM: tl.constexpr):  # fmt: skip
    """Norm (unless NORM is false), round and write ROWS rows; row i is of value i % num_values."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    slot = tl.load(slots + rows, rows < num_rows, other=-1)
    live = slot >= 0
    NOPE: tl.constexpr = DIM - ROPE
    d = tl.arange(0, D)
    start = values + (rows % num_values).to(tl.int64) * stride_n
    base = records + record_offsets(tl.maximum(slot, 0), stride_p, ENTRIES, RECORD, ALIGN)
    x = tl.load(start[:, None] + d[None, :], live[:, None] & (d < DIM)[None, :], other=0.0).to(tl.float32)
    # The few RoPE dims are read a second time, separately, which is cheaper than rotating them among the other dims.
    pair = tl.arange(0, PAIRS)
    turned = live[:, None] & (pair < ROPE // 2)[None, :]
    r = tl.arange(0, 2 * PAIRS)
    tail = live[:, None] & (r < ROPE)[None, :]
    y = tl.load(start[:, None] + (NOPE + r)[None, :], tail, other=0.0).to(tl.float32)
    if NORM:
        inverse = (1.0 / tl.sqrt(tl.sum(x * x, 1) / DIM + eps))[:, None]
        x = x * inverse * tl.load(weight + d, d < DIM, other=0.0)[None, :]
        y = y * inverse * tl.load(weight + NOPE + r, r < ROPE, other=0.0)[None, :]
        even, odd = tl.split(tl.reshape(y, (ROWS, PAIRS, 2)))
        at = rows[:, None] * (ROPE // 2) + pair[None, :]
        c = tl.load(cos + at, turned, other=1.0)
        s = tl.load(sin + at, turned, other=0.0)
        y = tl.reshape(tl.join(even * c - odd * s, even * s + odd * c), (ROWS, 2 * PAIRS))
    store_codes(x, base, live, ROWS, D, NOPE, SCALE_OFFSET, RECORD)
    rope = (base + NOPE).to(tl.pointer_type(tl.int16))
    tl.store(rope[:, None] + r[None, :], bf16_bits(y), tail)


@triton.jit
def _overlap_kernel(kv, gate, bias, prior_rows, first_rows, overlap_kv, overlap_gate, weight, cos, sin, eps, records,
                    slots, stride_n, stride_p, M: tl.constexpr, M_PAD: tl.constexpr, DIM: tl.constexpr,
                    ROPE: tl.constexpr, D: tl.constexpr, ENTRIES: tl.constexpr, RECORD: tl.constexpr,
                    ALIGN: tl.constexpr, SCALE_OFFSET: tl.constexpr, KEYS: tl.constexpr,
                    LOG2_D: tl.constexpr):  # fmt: skip
    """Pool one CSA group with the previous group's Ca rows, then norm, round and write it; skip a negative slot."""
    g = tl.program_id(0)
    if tl.load(slots + g) < 0:
        return
    r = tl.arange(0, M_PAD)[:, None]
    d = tl.arange(0, D)[None, :]
    used = (r < M) & (d < DIM)
    # This group's second series (Cb): the right half of its own rows.
    at = (tl.load(first_rows + g).to(tl.int64) + r) * stride_n + DIM + d
    cb_kv = tl.load(kv + at, used, other=0.0).to(tl.float32)
    cb_gate = tl.load(gate + at, used, other=0.0).to(tl.float32)
    cb_gate = tl.where(used, cb_gate + tl.load(bias + r * (2 * DIM) + DIM + d, used, other=0.0), float("-inf"))
    # The group before's first series (Ca): the left half of its rows, or the overlap state.
    prior = tl.load(prior_rows + g)
    if prior >= 0:
        before = (prior.to(tl.int64) + r) * stride_n + d
        ca_kv = tl.load(kv + before, used, other=0.0).to(tl.float32)
        ca_gate = tl.load(gate + before, used, other=0.0).to(tl.float32)
        ca_gate += tl.load(bias + r * (2 * DIM) + d, used, other=0.0)
    else:
        state = ((-1 - prior).to(tl.int64) * M + r) * DIM + d
        ca_kv = tl.load(overlap_kv + state, used, other=0.0)
        ca_gate = tl.load(overlap_gate + state, used, other=0.0)
    ca_gate = tl.where(used, ca_gate, float("-inf"))

    top = tl.maximum(tl.max(ca_gate, 0), tl.max(cb_gate, 0))
    # Padding columns have no row at all: keep their maximum finite, so that no NaN is made.
    top = tl.where(top == float("-inf"), 0.0, top)[None, :]
    ca, cb = tl.exp(ca_gate - top), tl.exp(cb_gate - top)
    total = tl.sum(ca, 0) + tl.sum(cb, 0)
    # A row with weight 0 must add 0, whatever values the empty overlap state holds.
    pooled = tl.sum(tl.where(ca > 0.0, ca * ca_kv, 0.0), 0) + tl.sum(cb * cb_kv, 0)
    x = (pooled / tl.where(total > 0.0, total, 1.0))[None, :]

    rows = g + tl.zeros((1,), tl.int32)
    slot = tl.load(slots + rows)
    live = slot >= 0
    x = norm_rope(x, rows, live, weight, cos, sin, eps, 1, D, DIM, ROPE)
    base = records + record_offsets(tl.maximum(slot, 0), stride_p, ENTRIES, RECORD, ALIGN)
    if KEYS:
        store_keys(x, base, live, 1, D, LOG2_D)
    else:
        store_entries(x, base, live, 1, D, DIM, ROPE, SCALE_OFFSET, RECORD)


@triton.jit
def _pool_kernel(kv, gate, bias, first_rows, slots, pooled, stride_n, M: tl.constexpr, DIM: tl.constexpr,
                 C: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    """Softmax-gated sum of C columns of one HCA group, online over ROWS rows at a time; of a dropped one nothing."""
    g = tl.program_id(0)
    if tl.load(slots + g) < 0:
        return
    d = tl.program_id(1) * C + tl.arange(0, C)[None, :]
    first = tl.load(first_rows + g).to(tl.int64)
    top = tl.full((ROWS, C), float("-inf"), tl.float32)
    total = tl.zeros((ROWS, C), tl.float32)
    acc = tl.zeros((ROWS, C), tl.float32)
    for start in range(0, M, ROWS):
        r = start + tl.arange(0, ROWS)[:, None]
        used = (r < M) & (d < DIM)
        z = tl.load(gate + (first + r) * stride_n + d, used, other=0.0).to(tl.float32)
        z = tl.where(used, z + tl.load(bias + r * DIM + d, used, other=0.0), float("-inf"))
        v = tl.load(kv + (first + r) * stride_n + d, used, other=0.0).to(tl.float32)
        new = tl.maximum(top, z)
        # Rows that have seen nothing yet stay at -inf: their factors must be 0, not exp(-inf + inf).
        safe = tl.where(new == float("-inf"), 0.0, new)
        old, now = tl.exp(top - safe), tl.exp(z - safe)
        total = tl.fma(total, old, now)
        acc = tl.fma(acc, old, now * v)
        top = new
    best = tl.max(top, 0)
    share = tl.exp(top - tl.where(best == float("-inf"), 0.0, best)[None, :])
    total_all = tl.sum(total * share, 0)
    out = tl.sum(acc * share, 0) / tl.where(total_all > 0.0, total_all, 1.0)
    columns = tl.program_id(1) * C + tl.arange(0, C)
    tl.store(pooled + g.to(tl.int64) * DIM + columns, out, columns < DIM)


def window_pack(rows: torch.Tensor, norm: Norm, target: Target) -> None:
    """RMSNorm, RoPE and round each token's KV row to its window entry.

    Shapes:  rows [N, c] float32 or bfloat16, last dim contiguous; norm.cos, norm.sin [N, rope / 2]; target.slots [N].
    Raises:  ValueError: wrong dtype, shape or stride.
    Source:  V4 report, section 3.5; oracle: reference.pack_entries(rope(rms_norm(rows))).
    """
    _check_norm(norm, rows.shape[0], rows.shape[-1])
    _launch_rows(rows, norm, target, 2 * norm.cos.shape[1])


def pack_entries(values: torch.Tensor, rope_dim: int, target: Target) -> None:
    """Round finished values [N, c] to entries, without norm or RoPE.

    target: with several times N slots, the values are written to the first N, to the next N, and so on.

    Raises:  ValueError: wrong dtype, shape or stride.
    Source:  V4 report, section 3.5; oracle: reference.pack_entries, equal to the byte.
    """
    _launch_rows(values, None, target, rope_dim)


def pack_hca(
    kv: torch.Tensor, gate: torch.Tensor, bias: torch.Tensor, first_rows: torch.Tensor, norm: Norm, target: Target
) -> None:
    """Compress disjoint groups of m rows to main entries.

    Shapes:  kv, gate [N, c] float32 or bfloat16 with one row stride; bias [m, c] float32; first_rows [G] int32, each
             at most N - m; norm.cos [G, rope / 2] at each group's first position; target.slots [G].
    Raises:  ValueError: wrong dtype, shape or stride.
    Source:  V4 report, section 2.3.2, equations 20 to 23; oracle: reference.pool_groups, then as window_pack.
    """
    groups, (m, dim) = first_rows.shape[0], bias.shape
    _check_projections(kv, gate, bias, dim, first_rows)
    _check_norm(norm, groups, dim)
    _check_slots(target, groups)
    pooled = torch.empty(groups, dim, dtype=torch.float32, device=kv.device)
    if groups:
        rows = min(_POOL_ROWS, triton.next_power_of_2(m))
        _pool_kernel[(groups, triton.cdiv(dim, _POOL_COLUMNS))](
            kv,
            gate,
            bias,
            first_rows,
            target.slots,
            pooled,
            kv.stride(0),
            M=m,
            DIM=dim,
            C=_POOL_COLUMNS,
            ROWS=rows,
            num_warps=_POOL_WARPS,
            enable_fp_fusion=False,
        )
    _launch_rows(pooled, norm, target, 2 * norm.cos.shape[1])


def pack_csa(
    kv: torch.Tensor,
    gate: torch.Tensor,
    bias: torch.Tensor,
    first_rows: torch.Tensor,
    overlap: Overlap,
    norm: Norm,
    target: Target,
) -> None:
    """Compress overlapping groups (this group's second series, the one before's first series) to main entries.

    Shapes:  kv, gate [N, 2c] float32 or bfloat16 with one row stride, first series left; bias [m, 2c] float32;
             first_rows [G] int32; overlap as in its class; norm.cos [G, rope / 2]; target.slots [G].
    Raises:  ValueError: wrong dtype, shape or stride.
    Source:  V4 report, section 2.3.1, equations 9 to 12; oracle: reference.pool_overlapped, then as window_pack.
    """
    dim = bias.shape[1] // 2
    fmt = EntryFormat(head_dim=dim, rope_dim=2 * norm.cos.shape[1])
    check_records(target.records, fmt.nbytes)
    check(byte_alignment(target.records) >= 2, "records must start at even addresses: they hold BF16")
    _launch_overlap(kv, gate, bias, first_rows, overlap, norm, target, fmt.scale_offset)


def pack_keys(
    kv: torch.Tensor,
    gate: torch.Tensor,
    bias: torch.Tensor,
    first_rows: torch.Tensor,
    overlap: Overlap,
    norm: Norm,
    target: Target,
) -> None:
    """The same as pack_csa at the indexer's width, Hadamard-rotated, to FP4 keys.

    Shapes:  as pack_csa with c = indexer dim, a power of two; target.records [P, E, c / 2 + ceil(c / 32)].
    Raises:  ValueError: wrong dtype, shape or stride.
    Source:  V4 report, section 2.3.1; oracle: reference.pack_keys(hadamard(rope(rms_norm(pool_overlapped)))).
    """
    check_records(target.records, KeyFormat(dim=bias.shape[1] // 2).nbytes)
    _launch_overlap(kv, gate, bias, first_rows, overlap, norm, target, None)


def _launch_rows(values: torch.Tensor, norm: Norm | None, target: Target, rope_dim: int) -> None:
    check(values.dim() == 2 and values.stride(1) == 1, "rows must be [N, c], last dim contiguous")
    check(values.dtype in (torch.float32, torch.bfloat16), f"rows must be float32 or bfloat16, are {values.dtype}")
    num_rows, dim = values.shape
    fmt = EntryFormat(head_dim=dim, rope_dim=rope_dim)
    check_records(target.records, fmt.nbytes)
    check(byte_alignment(target.records) >= 2, "records must start at even addresses: they hold BF16")
    num_values, num_rows = num_rows, target.slots.numel() if norm is None else num_rows
    _check_slots(target, num_rows)
    copies = max(num_rows // max(num_values, 1), 1)
    check(num_rows == copies * num_values, f"{num_rows} slots are no multiple of {num_values} values")
    if not num_values:
        return
    rows, warps = _ROW_TILE
    _rows_kernel[(triton.cdiv(num_rows, rows),)](
        values,
        norm.weight if norm else values,
        norm.cos if norm else values,
        norm.sin if norm else values,
        norm.eps if norm else 0.0,
        target.records,
        target.slots,
        num_rows,
        num_values,
        values.stride(0),
        target.records.stride(0),
        ENTRIES=target.records.shape[1],
        RECORD=fmt.nbytes,
        ALIGN=byte_alignment(target.records),
        SCALE_OFFSET=fmt.scale_offset,
        DIM=dim,
        ROPE=rope_dim,
        D=triton.next_power_of_2(dim),
        PAIRS=triton.next_power_of_2(rope_dim // 2),
        ROWS=rows,
        NORM=norm is not None,
        num_warps=warps,
        enable_fp_fusion=False,
    )


def _launch_overlap(
    kv: torch.Tensor,
    gate: torch.Tensor,
    bias: torch.Tensor,
    first_rows: torch.Tensor,
    overlap: Overlap,
    norm: Norm,
    target: Target,
    scale_offset: int | None,
) -> None:
    groups, m, dim = first_rows.shape[0], bias.shape[0], bias.shape[1] // 2
    _check_projections(kv, gate, bias, 2 * dim, first_rows)
    _check_norm(norm, groups, dim)
    _check_slots(target, groups)
    check(overlap.prior_rows.shape == (groups,) and overlap.prior_rows.dtype is torch.int32, "prior_rows: [G] int32")
    for state in (overlap.kv, overlap.gate):
        check(state.dim() == 3 and tuple(state.shape[1:]) == (m, dim), f"overlap state must be [S, {m}, {dim}]")
        check(state.dtype is torch.float32 and state.is_contiguous(), "overlap state must be contiguous float32")
    if not groups:
        return
    d = triton.next_power_of_2(dim)
    _overlap_kernel[(groups,)](
        kv,
        gate,
        bias,
        overlap.prior_rows,
        first_rows,
        overlap.kv,
        overlap.gate,
        norm.weight,
        norm.cos,
        norm.sin,
        norm.eps,
        target.records,
        target.slots,
        kv.stride(0),
        target.records.stride(0),
        M=m,
        M_PAD=triton.next_power_of_2(m),
        DIM=dim,
        ROPE=2 * norm.cos.shape[1],
        D=d,
        ENTRIES=target.records.shape[1],
        RECORD=target.records.shape[2],
        ALIGN=byte_alignment(target.records),
        SCALE_OFFSET=scale_offset or 0,
        KEYS=scale_offset is None,
        LOG2_D=d.bit_length() - 1,
        num_warps=max(1, min(4, d // 128)),
        enable_fp_fusion=False,
    )


def _check_projections(
    kv: torch.Tensor, gate: torch.Tensor, bias: torch.Tensor, width: int, first: torch.Tensor
) -> None:
    check(kv.dim() == 2 and kv.shape[1] == width and kv.shape == gate.shape, f"kv and gate must be [N, {width}]")
    check(kv.stride() == gate.stride() and kv.stride(1) == 1, "kv and gate must share strides, last dim contiguous")
    check(kv.dtype == gate.dtype and kv.dtype in (torch.float32, torch.bfloat16), "kv and gate: float32 or bfloat16")
    check(bias.dtype is torch.float32 and bias.is_contiguous(), "bias must be contiguous float32")
    check(first.dim() == 1 and first.dtype is torch.int32 and first.is_contiguous(), "first_rows must be [G] int32")


def _check_norm(norm: Norm, rows: int, dim: int) -> None:
    check(norm.weight.shape == (dim,) and norm.weight.dtype is torch.float32, f"weight must be [{dim}] float32")
    for table in (norm.cos, norm.sin):
        check(table.dim() == 2 and table.shape[0] == rows, f"cos and sin must be [{rows}, rope / 2]")
        check(table.dtype is torch.float32 and table.is_contiguous(), "cos and sin must be contiguous float32")
    check(norm.cos.shape == norm.sin.shape, "cos and sin must have one shape")


def _check_slots(target: Target, rows: int) -> None:
    check(target.slots.shape == (rows,) and target.slots.dtype is torch.int32, f"slots must be [{rows}] int32")
    check(target.slots.is_contiguous(), "slots must be contiguous")
