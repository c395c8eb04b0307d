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

from antefix_kernels import chained, hopper
from antefix_kernels.number_formats import EntryFormat, KeyFormat, byte_alignment, check, check_records
from antefix_kernels.pack_kernels import overlap_kernel, pool_kernel, rows_kernel

# Columns of a group that one program pools where groups are long (HCA), and its warps.
_POOL_COLUMNS = 32
_POOL_WARPS = 4
# How many programs pack rows one by one: as many warps of 64 registers as an H200 holds at once.
_ROW_PROGRAMS = 132 * 32


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
        pool_kernel[(groups * triton.cdiv(dim, _POOL_COLUMNS),)](
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
            ROWS=triton.next_power_of_2(m),
            num_warps=_POOL_WARPS,
            enable_fp_fusion=False,
            **chained.options(kv),
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
    rows_kernel[(min(num_values, _ROW_PROGRAMS), copies)](
        values,
        norm.weight if norm else values,
        norm.cos if norm else values,
        norm.sin if norm else values,
        norm.eps if norm else 0.0,
        target.records,
        target.slots,
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
        NORM=norm is not None,
        CONVERTS=hopper.converts_to_fp8(values),
        num_warps=1,
        enable_fp_fusion=False,
        **chained.options(values),
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
    overlap_kernel[(groups,)](
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
        CONVERTS=hopper.converts_to_fp8(kv),
        num_warps=max(1, min(4, d // 128)),
        enable_fp_fusion=False,
        **chained.options(kv),
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
