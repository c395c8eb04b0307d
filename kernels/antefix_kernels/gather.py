"""Read records back: unpack to BF16 or float32, and copy records as they are (checkpoints, handoffs, window rings).

Shapes:  P, E, R = blocks, entries per block, record bytes; N = records asked for; c = head dim, d = indexer dim.
Slot i is entry i % E of block i // E.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from antefix_kernels.finish import record_offsets
from antefix_kernels.number_formats import EntryFormat, KeyFormat, byte_alignment, check, check_records
from antefix_kernels.rounding import power_of_two

_FLOATS = (torch.bfloat16, torch.float16, torch.float32)


@triton.jit(do_not_specialize=["num_rows"])
def _unpack_entries_kernel(records, slots, out, num_rows, stride_p, stride_out, ENTRIES: tl.constexpr,
                           RECORD: tl.constexpr, ALIGN: tl.constexpr, SCALE_OFFSET: tl.constexpr, DIM: tl.constexpr,
                           ROPE: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    NOPE: tl.constexpr = DIM - ROPE
    GROUP: tl.constexpr = 64 if D > 64 else D
    GROUPS: tl.constexpr = D // GROUP
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = rows < num_rows
    slot = tl.load(slots + rows, live, other=0)
    base = records + record_offsets(slot, stride_p, ENTRIES, RECORD, ALIGN)
    d = tl.arange(0, D)
    codes = tl.load(base[:, None] + d[None, :], live[:, None] & (d < NOPE)[None, :], other=0)
    g = tl.arange(0, GROUPS)
    scale = tl.load(base[:, None] + (SCALE_OFFSET + g)[None, :], live[:, None] & (g * GROUP < NOPE)[None, :], other=127)
    factor = power_of_two(scale.to(tl.int32) - 127)
    nope = tl.reshape(codes.to(tl.float8e4nv, bitcast=True).to(tl.float32), (ROWS, GROUPS, GROUP))
    nope = tl.reshape(nope * factor[:, :, None], (ROWS, D))
    rope = (base + NOPE).to(tl.pointer_type(tl.bfloat16))
    tail = ((d >= NOPE) & (d < DIM))[None, :]
    turned = tl.load(rope[:, None] + (d - NOPE)[None, :], live[:, None] & tail, other=0.0).to(tl.float32)
    # Exact in BF16 too: a code has four significant bits, a scale is a power of two.
    values = tl.where(tail, turned, nope).to(out.dtype.element_ty)
    at = rows.to(tl.int64)[:, None] * stride_out + d[None, :]
    tl.store(out + at, values, live[:, None] & (d < DIM)[None, :])


@triton.jit(do_not_specialize=["num_rows"])
def _unpack_keys_kernel(records, slots, out, num_rows, stride_p, stride_out, ENTRIES: tl.constexpr,
                        RECORD: tl.constexpr, ALIGN: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    GROUP: tl.constexpr = 32 if D > 32 else D
    GROUPS: tl.constexpr = D // GROUP
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = rows < num_rows
    slot = tl.load(slots + rows, live, other=0)
    base = records + record_offsets(slot, stride_p, ENTRIES, RECORD, ALIGN)
    b = tl.load(base[:, None] + tl.arange(0, D // 2)[None, :], live[:, None], other=0).to(tl.int32)
    codes = tl.reshape(tl.join(b & 15, b >> 4), (ROWS, GROUPS, GROUP))
    # A nibble's exponent and mantissa bits, moved to FP16's: its value times 2^-14, subnormals included.
    half = (((codes & 7) << 9) | ((codes & 8) << 12)).to(tl.int16).to(tl.float16, bitcast=True)
    g = tl.arange(0, GROUPS)
    scale = tl.load(base[:, None] + (D // 2 + g)[None, :], live[:, None], other=127).to(tl.int32)
    values = half.to(tl.float32) * 16384.0 * power_of_two(scale - 127)[:, :, None]
    at = rows.to(tl.int64)[:, None] * stride_out + tl.arange(0, D)[None, :]
    tl.store(out + at, tl.reshape(values, (ROWS, D)).to(out.dtype.element_ty), live[:, None])


@triton.jit(do_not_specialize=["num_rows"])
def _copy_kernel(source, source_slots, dest, dest_slots, num_rows, stride_s, stride_d, ENTRIES_S: tl.constexpr,
                 ENTRIES_D: tl.constexpr, WORDS: tl.constexpr, WORDS_PAD: tl.constexpr,
                 ROWS: tl.constexpr):  # fmt: skip
    """Copy records of WORDS words; strides are in words, pointers have the word's type."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = rows < num_rows
    s = tl.load(source_slots + rows, live, other=0)
    t = tl.load(dest_slots + rows, live, other=0)
    from_word = (s // ENTRIES_S).to(tl.int64) * stride_s + (s % ENTRIES_S).to(tl.int64) * WORDS
    to_word = (t // ENTRIES_D).to(tl.int64) * stride_d + (t % ENTRIES_D).to(tl.int64) * WORDS
    w = tl.arange(0, WORDS_PAD)[None, :]
    mask = live[:, None] & (w < WORDS)
    tl.store(dest + to_word[:, None] + w, tl.load(source + from_word[:, None] + w, mask), mask)


def unpack_entries(records: torch.Tensor, slots: torch.Tensor, out: torch.Tensor, rope_dim: int) -> None:
    """Decode the named entries exactly.

    Shapes:  records [P, E, R] uint8; slots [N] int32 in [0, P * E); out [N, c] bfloat16, float16 (values in its
             range) or float32, last dim contiguous, every element written.
    Raises:  ValueError: wrong dtype, shape or stride.
    Source:  oracle: reference.read_entries, equal to the bit.
    """
    _check_out(out, slots)
    fmt = EntryFormat(head_dim=out.shape[1], rope_dim=rope_dim)
    check_records(records, fmt.nbytes)
    check(byte_alignment(records) >= 2, "records must start at even addresses: they hold BF16")
    if not slots.shape[0]:
        return
    rows = 8 if slots.shape[0] >= 4096 else 1
    _unpack_entries_kernel[(triton.cdiv(slots.shape[0], rows),)](
        records,
        slots,
        out,
        slots.shape[0],
        records.stride(0),
        out.stride(0),
        ENTRIES=records.shape[1],
        RECORD=fmt.nbytes,
        ALIGN=byte_alignment(records),
        SCALE_OFFSET=fmt.scale_offset,
        DIM=fmt.head_dim,
        ROPE=rope_dim,
        D=triton.next_power_of_2(fmt.head_dim),
        ROWS=rows,
        num_warps=4,
        enable_fp_fusion=False,
    )


def unpack_keys(records: torch.Tensor, slots: torch.Tensor, out: torch.Tensor) -> None:
    """Decode the named keys exactly (rotated, as stored).

    Shapes:  records [P, E, R] uint8; slots [N] int32; out [N, d] bfloat16 or float32, every element written.
    Raises:  ValueError: wrong dtype, shape or stride.
    Source:  oracle: reference.read_keys, equal to the bit.
    """
    _check_out(out, slots)
    fmt = KeyFormat(dim=out.shape[1])
    check_records(records, fmt.nbytes)
    if not slots.shape[0]:
        return
    rows = 16 if slots.shape[0] >= 4096 else 1
    _unpack_keys_kernel[(triton.cdiv(slots.shape[0], rows),)](
        records,
        slots,
        out,
        slots.shape[0],
        records.stride(0),
        out.stride(0),
        ENTRIES=records.shape[1],
        RECORD=fmt.nbytes,
        ALIGN=byte_alignment(records),
        D=fmt.dim,
        ROWS=rows,
        num_warps=4,
        enable_fp_fusion=False,
    )


def copy_records(
    source: torch.Tensor, source_slots: torch.Tensor, dest: torch.Tensor, dest_slots: torch.Tensor
) -> None:
    """Copy records byte for byte: out of a ring or pool into a payload (take-out), or back (put-back).

    Shapes:  source [P, E, R] uint8, dest [Q, F, R] uint8, source_slots and dest_slots [N] int32. Named destination
             slots must differ; the two pools must not overlap.
    Raises:  ValueError: wrong dtype, shape or stride.
    """
    check_records(source, source.shape[-1], "source")
    check_records(dest, source.shape[-1], "dest")
    num_rows = source_slots.shape[0]
    for slots in (source_slots, dest_slots):
        check(slots.shape == (num_rows,) and slots.dtype is torch.int32, "slots must be [N] int32, both of one length")
        check(slots.is_contiguous(), "slots must be contiguous")
    if not num_rows:
        return
    width = min(8, byte_alignment(source), byte_alignment(dest))
    word = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}[width]
    words = source.shape[2] // width
    # Many records: four per program of one warp, the fastest measured.
    rows, warps = (4, 1) if num_rows >= 4096 else (1, 4)
    _copy_kernel[(triton.cdiv(num_rows, rows),)](
        source.view(word),
        source_slots,
        dest.view(word),
        dest_slots,
        num_rows,
        source.stride(0) // width,
        dest.stride(0) // width,
        ENTRIES_S=source.shape[1],
        ENTRIES_D=dest.shape[1],
        WORDS=words,
        WORDS_PAD=triton.next_power_of_2(words),
        ROWS=rows,
        num_warps=warps,
        enable_fp_fusion=False,
    )


def _check_out(out: torch.Tensor, slots: torch.Tensor) -> None:
    check(slots.dim() == 1 and slots.dtype is torch.int32 and slots.is_contiguous(), "slots must be [N] int32")
    check(out.dim() == 2 and out.shape[0] == slots.shape[0], f"out must be [{slots.shape[0]}, dim]")
    check(out.dtype in _FLOATS and out.stride(1) == 1, "out must be bfloat16, float16 or float32, last dim contiguous")
