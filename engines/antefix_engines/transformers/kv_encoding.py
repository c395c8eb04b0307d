"""Encodes rows of KV as bytes: exactly, to the last bit, or as FP8 with a scale per group, which is approximate.

FP8 row: the numbers as E4M3, one byte each, in groups of 64; then one byte per group, the exponent of its power-of-two
scale plus 127 (UE8M0). The largest number of a group is scaled to lie between 224 and 448, which keeps about two
digits.
"""

from __future__ import annotations

import math
from typing import Final, Protocol

import torch
from torch import Tensor

from antefix.layout import Field, RecordLayout

GROUP: Final = 64
_E4M3_MAX: Final = 448.0


class KvEncoding(Protocol):
    """Rows are [rows, numbers]; their bytes are uint8 [rows, record.nbytes]."""

    name: str
    is_exact: bool

    def record(self, num_numbers: int, dtype: torch.dtype) -> RecordLayout:
        """The layout of a row of `num_numbers` numbers in a payload."""

    def encode(self, rows: Tensor) -> Tensor: ...

    def decode(self, raw: Tensor, num_numbers: int, dtype: torch.dtype) -> Tensor: ...


class Exact:
    """The bits of the numbers, in their own dtype."""

    name = "exact"
    is_exact = True

    def record(self, num_numbers: int, dtype: torch.dtype) -> RecordLayout:
        width = dtype.itemsize
        return RecordLayout(fields=(Field(name="values", offset=0, nbytes=num_numbers * width, width=width),))

    def encode(self, rows: Tensor) -> Tensor:
        return rows.contiguous().view(torch.uint8)

    def decode(self, raw: Tensor, num_numbers: int, dtype: torch.dtype) -> Tensor:
        # Copied, because a slice of a payload may begin at an address that the dtype does not allow.
        return raw.clone(memory_format=torch.contiguous_format).view(dtype)


class Fp8:
    """E4M3 with a power-of-two scale per 64 numbers."""

    name = "fp8"
    is_exact = False

    def record(self, num_numbers: int, dtype: torch.dtype) -> RecordLayout:
        num_groups = math.ceil(num_numbers / GROUP)
        return RecordLayout(
            fields=(
                Field(name="codes", offset=0, nbytes=num_numbers, width=1),
                Field(name="scales", offset=num_numbers, nbytes=num_groups, width=1),
            )
        )

    def encode(self, rows: Tensor) -> Tensor:
        groups = _groups(rows.float())
        # A group of zeros has no logarithm, so it gets the smallest scale that a byte can hold.
        exponents = torch.ceil(torch.log2(groups.abs().amax(-1) / _E4M3_MAX)).clamp(-127, 127)
        codes = (groups / torch.exp2(exponents)[..., None]).clamp(-_E4M3_MAX, _E4M3_MAX).to(torch.float8_e4m3fn)
        flat = codes.view(torch.uint8).reshape(rows.shape[0], -1)[:, : rows.shape[1]]
        return torch.cat((flat, (exponents + 127).to(torch.uint8)), dim=1)

    def decode(self, raw: Tensor, num_numbers: int, dtype: torch.dtype) -> Tensor:
        groups = _groups(raw[:, :num_numbers].contiguous().view(torch.float8_e4m3fn).float())
        scales = torch.exp2(raw[:, num_numbers:].float() - 127)
        return (groups * scales[..., None]).reshape(raw.shape[0], -1)[:, :num_numbers].to(dtype)


ENCODINGS: Final[dict[str, KvEncoding]] = {"exact": Exact(), "fp8": Fp8()}


def _groups(rows: Tensor) -> Tensor:
    """[rows, groups, 64]; the last group is filled up with zeros."""
    padding = -rows.shape[1] % GROUP
    return torch.nn.functional.pad(rows, (0, padding)).reshape(rows.shape[0], -1, GROUP)
