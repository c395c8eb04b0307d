"""The operands of attention kernels besides queries and entries, and the checks that these kernels share.

Shapes:  T = S * Q queries (S sequences of Q each, in order), H heads, D head dim, W window rows per sequence,
         R record bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from antefix_kernels.number_formats import EntryFormat, byte_alignment, check, check_records


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """The window of each query: `counts` rows of records [S, W, R] uint8 from row `firsts`, wrapping at W.

    firsts, counts [T] int32, counts <= W. The ring of a decoding sequence has W = n_win rows; a prefill buffer is long
    and never wraps.
    """

    records: torch.Tensor
    firsts: torch.Tensor
    counts: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Heads:
    """What a layer's heads add: sinks [H] float32, softmax scale, cos and sin [T, rope / 2] float32 of the queries'
    positions, by which the output's RoPE dims are rotated back.
    """

    sinks: torch.Tensor
    scale: float
    cos: torch.Tensor
    sin: torch.Tensor


def check_operands(
    q: torch.Tensor, records: torch.Tensor, window: Window, heads: Heads, out: torch.Tensor
) -> EntryFormat:
    """The entries' format.

    Raises:  ValueError: wrong dtype, shape or stride.
    """
    check(q.dim() == 3 and q.dtype is torch.float16 and q.stride(2) == 1, "q must be [T, H, D] float16")
    check(out.shape == q.shape and out.stride(2) == 1, "out must be [T, H, D], last dim contiguous")
    check(out.dtype in (torch.bfloat16, torch.float32), f"out must be bfloat16 or float32, is {out.dtype}")
    num_queries, num_heads, dim = q.shape
    fmt = EntryFormat(head_dim=dim, rope_dim=2 * heads.cos.shape[-1])
    check_records(records, fmt.nbytes)
    check_records(window.records, fmt.nbytes, "window records")
    check(min(byte_alignment(records), byte_alignment(window.records)) >= 2, "records must start at even addresses")
    sequences = window.records.shape[0]
    check(sequences > 0 and num_queries % sequences == 0, f"{num_queries} queries do not divide by {sequences}")
    for rows in (window.firsts, window.counts):
        check(rows.shape == (num_queries,) and rows.dtype is torch.int32, "firsts and counts must be [T] int32")
    check(heads.sinks.shape == (num_heads,) and heads.sinks.dtype is torch.float32, "sinks must be [H] float32")
    for table in (heads.cos, heads.sin):
        check(table.shape == (num_queries, fmt.rope_dim // 2), "cos and sin must be [T, rope / 2]")
        check(table.dtype is torch.float32 and table.is_contiguous(), "cos and sin must be contiguous float32")
    return fmt
