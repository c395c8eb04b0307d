"""All numbers that a decode step needs besides weights and states, in one launch: torch takes some ninety.

Everything is computed from the step's integers and from frequencies, so the host never waits.

Shapes:  S = sequences, B = blocks of the longest table, R = RoPE dims, G = kinds of compressed layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from antefix_kernels.number_formats import check

# Columns of a step's integers that come before the block table: token, position, seat, cut.
COLUMNS = 4
_BLOCKS = 1024
_GROUP_NUMBERS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Closing:
    """The groups of one kind that a step closes, each [S] int32.

    slots: of their entries; -1 where a sequence closes none.  closes: 1 where it closes one.  first_rows: the first row
    of the group in its seat's tail.  prior_rows: -1 - seat.  visible: how many entries are visible to a sequence.
    """

    slots: torch.Tensor
    closes: torch.Tensor
    first_rows: torch.Tensor
    prior_rows: torch.Tensor
    visible: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class StepNumbers:
    """position, seat, counts, firsts, none (zeros): [S] int32; counts and firsts say where a window lies in its ring.

    window_slots: [2 S] int32, where a window record is written.  tables: [S, B] int32.
    closing: one per ratio.  angles: [2 + G, S, R / 2] float32, of the positions times the main and the other
    frequencies, and of each ratio's first token times the other ones.  turns: [2, S, R / 2], ones, then zeros.
    """

    position: torch.Tensor
    seat: torch.Tensor
    counts: torch.Tensor
    firsts: torch.Tensor
    none: torch.Tensor
    window_slots: torch.Tensor
    tables: torch.Tensor
    closing: tuple[Closing, ...]
    angles: torch.Tensor
    turns: torch.Tensor


@triton.jit
def _close_group(integers, numbers, at, position, seat, RATIO: tl.constexpr, PER_BLOCK: tl.constexpr,
                 BEFORE: tl.constexpr, WRITE: tl.constexpr, ROWS):  # fmt: skip
    """Store one kind's numbers of one sequence at numbers + at, ROWS apart. Returns the group's first token."""
    entry = position // RATIO
    # Seat 0 belongs to rows that pad the batch.
    closes = ((position + 1) % RATIO == 0) & (seat > 0)
    block = tl.load(integers + BEFORE + entry // PER_BLOCK)
    slot = tl.where(closes & WRITE, block * PER_BLOCK + entry % PER_BLOCK, -1)
    tl.store(numbers + at, slot)
    tl.store(numbers + at + ROWS, closes.to(tl.int32))
    tl.store(numbers + at + 2 * ROWS, seat * (2 * RATIO))
    tl.store(numbers + at + 3 * ROWS, -1 - seat)
    tl.store(numbers + at + 4 * ROWS, (position + 1) // RATIO)
    return entry * RATIO


@triton.jit
def _store_angles(angles, frequencies, position, pair, PAIRS: tl.constexpr):
    f = tl.load(frequencies + pair, pair < PAIRS, other=0.0)
    tl.store(angles + pair, position.to(tl.float32) * f, pair < PAIRS)


@triton.jit(do_not_specialize=["num_rows", "num_blocks", "stride"])
def _numbers_kernel(integers, numbers, slots, tables, main, other, angles, turns, num_rows, num_blocks, stride, ROWS,
                    WINDOW: tl.constexpr, RATIO_A: tl.constexpr, RATIO_B: tl.constexpr, BLOCK: tl.constexpr,
                    PAIRS: tl.constexpr, PAIRS_PAD: tl.constexpr, WRITE: tl.constexpr, BEFORE: tl.constexpr,
                    BLOCKS: tl.constexpr):  # fmt: skip
    """BLOCKS entries of one sequence's block table; the first program of a sequence also computes its numbers."""
    s = tl.program_id(0)
    mine = integers + s.to(tl.int64) * stride
    b = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    block = tl.load(mine + BEFORE + b, b < num_blocks, other=0)
    tl.store(tables + s.to(tl.int64) * num_blocks + b, block, b < num_blocks)
    if tl.program_id(1) == 0:
        position = tl.load(mine + 1)
        seat = tl.load(mine + 2)
        cut = tl.load(mine + 3)
        counts = tl.minimum(position + 1 - cut, WINDOW)
        tl.store(numbers + s, position)
        tl.store(numbers + ROWS + s, seat)
        tl.store(numbers + 2 * ROWS + s, counts)
        tl.store(numbers + 3 * ROWS + s, seat * (2 * WINDOW) + (position + 1 - counts) % WINDOW)
        tl.store(numbers + 4 * ROWS + s, 0)
        # Each record is written to two slots, so that any window is one run of slots.
        slot = seat * (2 * WINDOW) + position % WINDOW
        tl.store(slots + s, slot)
        tl.store(slots + num_rows + s, slot + WINDOW)
        pair = tl.arange(0, PAIRS_PAD)
        row = s * PAIRS
        plane = num_rows * PAIRS
        _store_angles(angles + row, main, position, pair, PAIRS)
        _store_angles(angles + plane + row, other, position, pair, PAIRS)
        if RATIO_A:
            start = _close_group(
                mine, numbers, 5 * ROWS + s, position, seat, RATIO_A, BLOCK // RATIO_A, BEFORE, WRITE, ROWS
            )
            _store_angles(angles + 2 * plane + row, other, start, pair, PAIRS)
        if RATIO_B:
            start = _close_group(
                mine, numbers, 10 * ROWS + s, position, seat, RATIO_B, BLOCK // RATIO_B, BEFORE, WRITE, ROWS
            )
            _store_angles(angles + 3 * plane + row, other, start, pair, PAIRS)
        one = tl.full((PAIRS_PAD,), 1.0, tl.float32)
        tl.store(turns + row + pair, one, pair < PAIRS)
        tl.store(turns + plane + row + pair, one - one, pair < PAIRS)


def step_numbers(
    integers: torch.Tensor,
    *,
    window: int,
    block_size: int,
    ratios: Sequence[int],
    main: torch.Tensor,
    other: torch.Tensor,
    write: bool,
) -> StepNumbers:
    """The numbers of a step.

    Shapes:  integers [S, 4 + B] int32: token, position, seat, cut, then the block table; main, other [R / 2] float32
             frequencies; ratios: at most two, which divide the block size.
             write: whether complete groups have slots.
    Raises:  ValueError: wrong dtype, shape or stride.
    Source:  antefix.model.seated_chunks computes the same with torch.
    """
    num_rows, num_columns = integers.shape
    num_blocks, pairs = num_columns - COLUMNS, len(main)
    check(integers.dtype is torch.int32 and integers.stride(1) == 1, "integers: int32, contiguous rows")
    check(num_blocks > 0 and len(ratios) <= 2, "need a block table, and at most two kinds of compressed layers")
    check(all(block_size % ratio == 0 for ratio in ratios), "ratios must divide the block size")
    for table in (main, other):
        check(
            table.shape == (pairs,) and table.dtype is torch.float32 and table.is_contiguous(), "frequencies: float32"
        )
    device = integers.device
    # Rows of numbers begin at multiples of 16 bytes for any number of sequences, so kernels that read them are compiled
    # once.
    padded = -(-num_rows // 4) * 4
    numbers = torch.empty(5 + _GROUP_NUMBERS * len(ratios), padded, dtype=torch.int32, device=device)
    slots = torch.empty(2 * num_rows, dtype=torch.int32, device=device)
    tables = torch.empty(num_rows, num_blocks, dtype=torch.int32, device=device)
    angles = torch.empty(2 + len(ratios), num_rows, pairs, dtype=torch.float32, device=device)
    turns = torch.empty(2, num_rows, pairs, dtype=torch.float32, device=device)
    _numbers_kernel[(num_rows, triton.cdiv(num_blocks, _BLOCKS))](
        integers,
        numbers,
        slots,
        tables,
        main,
        other,
        angles,
        turns,
        num_rows,
        num_blocks,
        integers.stride(0),
        padded,
        WINDOW=window,
        RATIO_A=ratios[0] if ratios else 0,
        RATIO_B=ratios[1] if len(ratios) > 1 else 0,
        BLOCK=block_size,
        PAIRS=pairs,
        PAIRS_PAD=triton.next_power_of_2(pairs),
        WRITE=write,
        BEFORE=COLUMNS,
        BLOCKS=_BLOCKS,
        num_warps=4,
        enable_fp_fusion=False,
    )
    rows = [row[:num_rows] for row in numbers.unbind()]
    groups = [rows[5 + _GROUP_NUMBERS * i :][:_GROUP_NUMBERS] for i in range(len(ratios))]
    return StepNumbers(
        position=rows[0],
        seat=rows[1],
        counts=rows[2],
        firsts=rows[3],
        none=rows[4],
        window_slots=slots,
        tables=tables,
        closing=tuple(Closing(slots=a, closes=b, first_rows=c, prior_rows=d, visible=e) for a, b, c, d, e in groups),
        angles=angles,
        turns=turns,
    )
