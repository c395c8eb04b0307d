"""Byte layout of packed entries and keys, as the kernels read it. This module knows bytes and tensors' shapes, but no
kernel.

An entry (head_dim = nope + rope): nope FP8 E4M3 codes | rope BF16 | one UE8M0 scale per 64 codes | zero padding to
a multiple of 8 bytes. A key: FP4 E2M1 codes, two per byte, even dim in the low nibble | one UE8M0 scale per 32 codes.
V4: 584 and 68 bytes. A UE8M0 scale byte b means 2^(b - 127).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

FP8_GROUP = 64
FP4_GROUP = 32
# As in DeepSeek's inference code, a group's largest magnitude counts as at least this when its scale is chosen.
FP8_AMAX_MIN = 1e-4
FP4_AMAX_MIN = 6.0 * 2.0**-126


@dataclass(frozen=True, slots=True, kw_only=True)
class EntryFormat:
    """One packed main entry or window entry."""

    head_dim: int
    rope_dim: int

    def __post_init__(self) -> None:
        if self.rope_dim < 2 or self.rope_dim % 2 or self.rope_dim >= self.head_dim or self.head_dim % 2:
            raise ValueError(
                f"rope_dim must be even, at least 2 and less than head_dim, are {self.rope_dim} and {self.head_dim}"
            )

    @property
    def nope_dim(self) -> int:
        return self.head_dim - self.rope_dim

    @property
    def num_scales(self) -> int:
        return -(-self.nope_dim // FP8_GROUP)

    @property
    def scale_offset(self) -> int:
        return self.nope_dim + 2 * self.rope_dim

    @property
    def nbytes(self) -> int:
        return -(-(self.scale_offset + self.num_scales) // 8) * 8


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyFormat:
    """One packed indexer key; `dim` is a power of two, for the Hadamard rotation."""

    dim: int

    def __post_init__(self) -> None:
        if self.dim < 2 or self.dim & (self.dim - 1):
            raise ValueError(f"dim must be a power of two, is {self.dim}")

    @property
    def num_scales(self) -> int:
        return -(-self.dim // FP4_GROUP)

    @property
    def nbytes(self) -> int:
        return self.dim // 2 + self.num_scales


def check_records(records: torch.Tensor, nbytes: int, name: str = "records") -> None:
    """Check [P, E, R] uint8 views of a pool: rows of records in order, with any number of bytes between two rows.

    Raises:  ValueError: wrong dtype, shape or stride.
    """
    if records.dtype is not torch.uint8 or records.dim() != 3 or records.shape[2] != nbytes:
        raise ValueError(f"{name} must be [P, E, {nbytes}] uint8, is {list(records.shape)} {records.dtype}")
    if records.stride(2) != 1 or records.stride(1) != nbytes:
        raise ValueError(f"{name}' records must be contiguous in memory, strides are {records.stride()}")


def byte_alignment(records: torch.Tensor) -> int:
    """Largest power of two up to 16 that divides every record's address: how wide the kernel's loads may be."""
    align = 16
    for number in (records.data_ptr(), records.stride(0), records.stride(1)):
        while number % align:
            align //= 2
    return align


def check(condition: bool, message: str) -> None:
    """One line of the checks that a wrapper makes.

    Raises:  ValueError(message) unless `condition`.
    """
    if not condition:
        raise ValueError(message)
