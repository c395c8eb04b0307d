"""KV records: rounding as in the released inference code, and the bytes that the pool and the disk hold.

Entries (window and main): the dims without RoPE as FP8 E4M3 in groups of 64 with a power-of-two scale, RoPE dims as
BF16. Indexer keys and queries: Hadamard rotation times d^-1/2, then FP4 E2M1 in groups of 32 with a power-of-two scale.
The scale of a group is the smallest power of two that keeps the group's largest value within the code's range, stored
as its biased exponent (UE8M0). Rounding is to nearest, ties to even. docs/FORMAT.md has the tables.

Rounded values stay the same when they are packed again: unpack(pack(x)) gives records of the same values when it is
packed. The packed bytes may differ once: if rounding brings a group's largest value down to exactly half the range, the
group is packed again with half the scale and doubled codes.

Shapes:  ... = any leading dims, C = head dim, B = record bytes, R = RoPE dims.
Source:  V4 report, section 3.5; released inference kernels' act_quant and fp4_act_quant (floors 1e-4 and 6 * 2^-126).
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from antefix.layout import FP4_GROUP, FP8_GROUP, BlockLayout, KVFormat, Part, PartKind
from antefix.model.compiled.switch import is_compiled

FP8_MAX = 448.0
FP4_MAX = 6.0
# Lower limits of a group's largest value, as in the released kernels, so that an all-zero group has a valid scale.
FP8_FLOOR = 1e-4
FP4_FLOOR = 6.0 * 2.0**-126
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def value_dtype(kv_format: KVFormat) -> torch.dtype:
    """The type in which decoded KV, overlap state and tail buffers are computed."""
    return torch.float64 if kv_format is KVFormat.FLOAT64 else torch.float32


def pack_entries(x: Tensor, layout: BlockLayout) -> Tensor:
    """Entries [..., C] to records [..., B] uint8."""
    if layout.kv_format is not KVFormat.FP8:
        return _as_bytes(x.to(value_dtype(layout.kv_format)))
    geometry = layout.geometry
    plain, rope = x.float().split_with_sizes((geometry.nope_dim, geometry.rope_dim), dim=-1)
    groups = _groups(plain, FP8_GROUP)
    scales = _scales(groups, FP8_FLOOR, FP8_MAX)
    codes = _fp8_codes(groups, scales).flatten(-2)[..., : geometry.nope_dim]
    head = codes, _as_bytes(rope.to(torch.bfloat16)), _exponents(scales)
    packed = torch.cat(head, dim=-1)
    return F.pad(packed, (0, entry_bytes(layout) - packed.shape[-1]))


def unpack_entries(records: Tensor, layout: BlockLayout) -> Tensor:
    """Records [..., B] uint8 to entries [..., C]."""
    if layout.kv_format is not KVFormat.FP8:
        return _from_bytes(records, value_dtype(layout.kv_format))
    geometry = layout.geometry
    plain, rope_end = geometry.nope_dim, geometry.nope_dim + 2 * geometry.rope_dim
    num_groups = -(-plain // FP8_GROUP)
    scales = _power_of_two(records[..., rope_end : rope_end + num_groups].to(torch.int32))
    out = torch.empty(*records.shape[:-1], geometry.head_dim, device=records.device)
    torch.mul(
        _look_up(fp8_values(records.device), records[..., :plain]),
        scales.repeat_interleave(FP8_GROUP, dim=-1)[..., :plain],
        out=out[..., :plain],
    )
    out[..., plain:] = _from_bytes(records[..., plain:rope_end], torch.bfloat16)
    return out


def pack_keys(x: Tensor, layout: BlockLayout) -> Tensor:
    """Indexer keys [..., C] to records [..., B] uint8; the FP8 format rotates them first."""
    if layout.kv_format is not KVFormat.FP8:
        return _as_bytes(x.to(value_dtype(layout.kv_format)))
    groups = _groups(hadamard(x.float()), FP4_GROUP)
    scales = _scales(groups, FP4_FLOOR, FP4_MAX)
    codes = _fp4_codes((groups / scales).clamp_(-FP4_MAX, FP4_MAX)).flatten(-2)[..., : x.shape[-1]]
    packed = codes[..., 0::2] | (codes[..., 1::2] << 4)
    return torch.cat((packed, _exponents(scales)), dim=-1)


def unpack_keys(records: Tensor, layout: BlockLayout) -> Tensor:
    """Records [..., B] uint8 to keys [..., C]. If the format rotates keys by a Hadamard transform, the returned keys
    stay rotated.
    """
    if layout.kv_format is not KVFormat.FP8:
        return _from_bytes(records, value_dtype(layout.kv_format))
    dim = layout.geometry.indexer_dim
    values = _look_up(fp4_pairs(records.device), records[..., : dim // 2]).flatten(-2)
    scales = _power_of_two(records[..., dim // 2 :].to(torch.int32))
    return values * scales.repeat_interleave(FP4_GROUP, dim=-1)[..., :dim]


def round_entries(x: Tensor, layout: BlockLayout) -> Tensor:
    """Entries [..., C] rounded as if they had been stored and read back."""
    if layout.kv_format is not KVFormat.FP8:
        return x.to(value_dtype(layout.kv_format))
    geometry = layout.geometry
    if is_compiled(x):
        from antefix.model.compiled import tokens

        return tokens.round_entries(x, geometry.rope_dim)
    plain, rope = x.float().split_with_sizes((geometry.nope_dim, geometry.rope_dim), dim=-1)
    return torch.cat((round_groups(plain, FP8_GROUP), rope.to(torch.bfloat16).float()), dim=-1)


def round_queries(q: Tensor, layout: BlockLayout) -> Tensor:
    """Indexer queries [..., C] rotated and rounded like the keys with which they are multiplied."""
    if layout.kv_format is not KVFormat.FP8:
        return q
    if is_compiled(q):
        from antefix.model.compiled import tokens

        return tokens.round_queries(q)
    groups = _groups(hadamard(q.float()), FP4_GROUP)
    scales = _scales(groups, FP4_FLOOR, FP4_MAX)
    rounded = _round_to_fp4((groups / scales).clamp_(-FP4_MAX, FP4_MAX)).mul_(scales)
    return rounded.flatten(-2)[..., : q.shape[-1]]


def pack(kind: PartKind, x: Tensor, layout: BlockLayout) -> Tensor:
    return pack_keys(x, layout) if kind is PartKind.INDEXER_KEYS else pack_entries(x, layout)


def unpack(kind: PartKind, records: Tensor, layout: BlockLayout) -> Tensor:
    return unpack_keys(records, layout) if kind is PartKind.INDEXER_KEYS else unpack_entries(records, layout)


def decode(kind: PartKind, records: Tensor, layout: BlockLayout, *, out: Tensor) -> Tensor:
    """`unpack` of checked FP8-format records [..., B] into `out` [..., C], in a quarter of its time; returns `out`.

    The bits are those of `unpack`, except for codes that mean NaN, which `finite.unusable_rows` finds: here they give
    numbers.
    """
    geometry = layout.geometry
    if kind is PartKind.INDEXER_KEYS:
        codes = geometry.indexer_dim // 2
        # The two values of a byte are copied as one number of 64 bits.
        pairs = fp4_pairs(records.device).view(torch.int64).flatten()
        values = pairs.index_select(0, records[..., :codes].reshape(-1).int()).view(torch.float32).view(out.shape)
        return _scaled(values, _power_of_two(records[..., codes:].to(torch.int32)), FP4_GROUP, out)
    plain, rope_end = geometry.nope_dim, geometry.nope_dim + 2 * geometry.rope_dim
    num_groups = -(-plain // FP8_GROUP)
    # Shifted by 7 bits, an E4M3 code is half-precision bits of the value times 2^-8; bit 14 is a copy of the sign.
    halves = (records[..., :plain].view(torch.int8).to(torch.int16) << 7).bitwise_and_(~0x4000).view(torch.float16)
    scales = _power_of_two(records[..., rope_end : rope_end + num_groups].to(torch.int32)) * 256
    _scaled(halves.float(), scales, FP8_GROUP, out[..., :plain])
    out[..., plain:] = _from_bytes(records[..., plain:rope_end], torch.bfloat16)
    return out


def _scaled(values: Tensor, scales: Tensor, group: int, out: Tensor) -> Tensor:
    """values [..., n] times their groups' scales [..., groups], into `out` [..., n]."""
    for number in range(scales.shape[-1]):
        part = slice(number * group, (number + 1) * group)
        torch.mul(values[..., part], scales[..., number : number + 1], out=out[..., part])
    return out


def width_of(part: Part, layout: BlockLayout) -> int:
    """How many numbers one decoded record of `part` has."""
    return layout.geometry.indexer_dim if part.kind is PartKind.INDEXER_KEYS else layout.geometry.head_dim


def entry_bytes(layout: BlockLayout) -> int:
    """Bytes of one entry record."""
    return layout.window_bytes // (layout.geometry.num_layers * layout.geometry.window)


def round_groups(x: Tensor, size: int) -> Tensor:
    """x [..., n] in groups of `size`, each rounded to FP8 codes times a power of two, as float32."""
    groups = _groups(x.float(), size)
    scales = _scales(groups, FP8_FLOOR, FP8_MAX)
    values = _look_up(fp8_values(x.device), _fp8_codes(groups, scales)).mul_(scales)
    return values.flatten(-2)[..., : x.shape[-1]]


def hadamard(x: Tensor) -> Tensor:
    """Sylvester's Hadamard transform of the last dim, a power of two d, times d^-1/2.

    Butterflies of plain additions give the same bits on any device, which a matrix product would not promise.
    """
    dim = x.shape[-1]
    half = 1
    while half < dim:
        pairs = x.reshape(*x.shape[:-1], dim // (2 * half), 2, half)
        low, high = pairs.unbind(-2)
        x = torch.stack((low + high, low - high), dim=-2).view(*x.shape[:-1], dim)
        half *= 2
    return x * math.pow(dim, -0.5)


def _groups(x: Tensor, size: int) -> Tensor:
    """[..., n] as [..., groups, size]; the last group is padded with zeros."""
    missing = -x.shape[-1] % size
    padded = F.pad(x, (0, missing)) if missing else x
    return padded.reshape(*x.shape[:-1], -1, size)


def _scales(groups: Tensor, floor: float, code_max: float) -> Tensor:
    """Powers of two [..., groups, 1] float32: 2^ceil(log2(largest / code_max)), computed on the float's bits."""
    largest = groups.abs().amax(-1, keepdim=True).clamp_(min=floor)
    # Multiplied by the float32 reciprocal, as in the kernels; where the quotient is a power of two the product is too.
    bits = (largest * (1.0 / code_max)).view(torch.int32)
    # Adding this makes any set bit of the mantissa carry into the exponent, which rounds up.
    return (bits + 0x7FFFFF).bitwise_and_(0x7F800000).view(torch.float32)


def _exponents(scales: Tensor) -> Tensor:
    """Biased exponents [..., groups] uint8 of powers of two [..., groups, 1]."""
    return (scales.view(torch.int32) >> 23).squeeze(-1).to(torch.uint8)


def _power_of_two(exponents: Tensor) -> Tensor:
    """float32 powers of two from biased exponents (int32, 1 to 254)."""
    return (exponents << 23).view(torch.float32)


def _fp8_codes(groups: Tensor, scales: Tensor) -> Tensor:
    """E4M3 codes (uint8) of groups divided by their scales."""
    return (groups / scales).clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).view(torch.uint8)


def _round_to_fp4(x: Tensor) -> Tensor:
    """Values in [-6, 6] rounded to E2M1 values, ties to even: the values of `_fp4_codes`, without the codes.

    From 1 on, steps are half of the power of two below a value; below 1 they are a half. Only the rounding is inexact.
    """
    powers = x.view(torch.int32).bitwise_and(0x7F800000).clamp_(min=0x3F800000).view(torch.float32)
    return (x / powers).mul_(2).round_().mul_(powers).mul_(0.5)


def _fp4_codes(x: Tensor) -> Tensor:
    """E2M1 codes (uint8) of values in [-6, 6]; bit 3 is the sign, kept on zeros too."""
    magnitude = x.abs()
    # Below 1 the codes are steps of a half. From 1 on, exponent and first mantissa bit are the code (1.0 is code 2),
    # after the other mantissa bits are rounded to nearest, ties to even.
    bits = magnitude.view(torch.int32)
    normal = ((bits + 0x1FFFFF + ((bits >> 22) & 1)) >> 22) - (2 * 127 - 2)
    codes = torch.where(magnitude < 1, torch.round(magnitude * 2).to(torch.int32), normal).to(torch.uint8)
    return codes | (torch.signbit(x).to(torch.uint8) << 3)


@functools.cache
def fp8_values(device: torch.device) -> Tensor:
    """The value of every FP8 code, [256] float32."""
    return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().to(device)


@functools.cache
def fp4_pairs(device: torch.device) -> Tensor:
    """The two values of every byte of FP4 codes, low nibble first, [256, 2] float32."""
    codes = torch.arange(256)
    values = torch.tensor((*_E2M1, *(-value for value in _E2M1)))
    return torch.stack((values[codes & 15], values[codes >> 4]), dim=-1).to(device)


def _look_up(table: Tensor, codes: Tensor) -> Tensor:
    """Values from `table` by code. One table look-up is five times faster than converting FP8 numbers on a CPU."""
    return table.index_select(0, codes.reshape(-1).int()).view(codes.shape + table.shape[1:])


def _as_bytes(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)


def _from_bytes(records: Tensor, dtype: torch.dtype) -> Tensor:
    packed, width = records.contiguous(), dtype.itemsize
    # A copy is needed if a record's slice, or a stride, is not aligned to the wider type. `contiguous` does not change
    # strides of dims that have one element.
    if packed.data_ptr() % width or any(stride % width for stride in packed.stride()[:-1]):
        packed = packed.clone(memory_format=torch.contiguous_format)
    return packed.view(dtype)
