"""Weights in their released form: FP8 or FP4 codes with a scale per block. Packed weights stay packed and are decoded
by tile.

Inputs of packed products are rounded to FP8, as in the released code: in groups of 128 addends, each with the smallest
power of two that keeps its largest value within the code's range. The grouped output projection is the exception: the
released code multiplies it in BF16, without rounding its inputs.

    codes       FP8 E4M3: one byte per weight.  FP4 E2M1: two weights per byte, the even one in the low nibble
    scales      one per block of `block` (rows, addends): float8_e8m0fnu (2^(byte - 127)) or float32

Shapes:  E = experts, O = outputs, K = addends, B = bytes of a row (K, or K / 2 for FP4), N = rows of inputs.
Source:  inference/model.py and kernel.py of the released checkpoints; oracle: transformers' Fp8Dequantize.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from antefix_kernels.linear import Routing
    from antefix_kernels.packed_linear import Weight

from antefix.model.quant import fp4_pairs, fp8_values, round_groups

# How many addends share a scale when inputs are rounded.
INPUT_GROUP = 128
# True: rounded inputs and packed weights are multiplied on FP8 tensor cores where a GPU has them
# (`antefix_kernels.packed_fp8`). False: in BF16 everywhere (`antefix_kernels.packed_linear`). The two give different
# bits, so names of KV differ.
USES_FP8 = True


@dataclass(frozen=True, slots=True)
class PackedMatrix:
    """One matrix [O, K]: codes [O, B], scales [ceil(O / rows), ceil(K / addends)]."""

    codes: Tensor
    scales: Tensor
    block: tuple[int, int]
    rounds_inputs: bool = True

    @property
    def is_fp4(self) -> bool:
        return self.codes.dtype is torch.uint8

    @property
    def shape(self) -> torch.Size:
        rows, width = self.codes.shape
        return torch.Size((rows, width * 2 if self.is_fp4 else width))

    def decode(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Rows [start, stop) as numbers: code times scale in float32, then cast to `dtype`, as in transformers."""
        rows, addends = self.block
        values = decode_codes(self.codes[start:stop])
        scales = self.scales[start // rows : -(-stop // rows)].float()
        if rows > 1:
            scales = scales.repeat_interleave(rows, 0)[start % rows : start % rows + stop - start]
        num_addends = values.shape[1]
        if num_addends % addends:
            return (values * scales.repeat_interleave(addends, 1)[:, :num_addends]).to(dtype)
        return values.view(len(values), -1, addends).mul_(scales.unsqueeze(2)).view(len(values), -1).to(dtype)


def decode_codes(codes: Tensor) -> Tensor:
    """The values [O, K] float32 of codes [O, B], without their scales."""
    as_bytes = codes.view(torch.uint8).reshape(-1).int()
    if codes.dtype is torch.uint8:
        return fp4_pairs(codes.device).index_select(0, as_bytes).view(len(codes), -1)
    return fp8_values(codes.device).index_select(0, as_bytes).view(codes.shape)


def round_inputs(x: Tensor) -> Tensor:
    """x [N, K] rounded as FP8 products round it: FP8 codes times their group's power of two, exact in x's type."""
    return round_groups(x, INPUT_GROUP).to(x.dtype)


def takes_fp8(x: Tensor, weight: Weight, *, rounds_inputs: bool) -> bool:
    """Whether x is multiplied on FP8 tensor cores: on Hopper, in BF16 models, where inputs are rounded anyway."""
    from antefix_kernels import packed_fp8

    is_able = USES_FP8 and rounds_inputs and x.dtype is torch.bfloat16 and packed_fp8.takes(weight)
    return is_able and packed_fp8.runs_on(x)


def card_splits(weight: PackedMatrix) -> int:
    """The number of runs into which a GPU splits the sums of this matrix."""
    from antefix_kernels import packed_linear

    return packed_linear.num_splits(_operand(weight, 1))


def joined_matrix(weights: Sequence[PackedMatrix]) -> PackedMatrix | None:
    """Several matrices [O, K], one under the other (`stacked`); None if they are not packed alike, or if two of them
    would share a block of scales.
    """
    first = weights[0]
    forms = {(w.codes.dtype, w.scales.dtype, w.codes.device, w.shape[1], w.block, w.rounds_inputs) for w in weights}
    if len(forms) > 1 or any(weight.shape[0] % weight.block[0] for weight in weights):
        return None
    codes, scales = [_bytes_of(w.codes) for w in weights], [_bytes_of(w.scales) for w in weights]
    return replace(first, codes=stacked(codes).view(first.codes.dtype), scales=stacked(scales).view(first.scales.dtype))


def stacked(parts: Sequence[Tensor]) -> Tensor:
    """Matrices [O, B] of one type, one under the other: a view if they already lie so in one memory, else a copy.
    Recorded CUDA graphs read weights where they lay, so a weight must not move without need.
    """
    first = parts[0]
    memory, end = first.untyped_storage().data_ptr(), first.data_ptr()
    for part in parts:
        if not part.is_contiguous() or part.untyped_storage().data_ptr() != memory or part.data_ptr() != end:
            return torch.cat(list(parts))
        end += part.nbytes
    return first.as_strided((sum(map(len, parts)), first.shape[1]), (first.shape[1], 1))


def _bytes_of(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)


def card_product(x: Tensor, weight: PackedMatrix, *, splits: int | None = None) -> Tensor:
    """x [N, G, K] times a matrix [G * O, K], computed group by group: [N, G, O]. The kernels on a GPU read the packed
    codes.

    splits: into how many runs sums are split; None: as the kernels choose by the matrix.
    """
    from antefix_kernels import packed_fp8, packed_linear

    operand = _operand(weight, x.shape[1])
    flat = x.reshape(-1, x.shape[2])
    if takes_fp8(x, operand, rounds_inputs=weight.rounds_inputs):
        codes = packed_fp8.prepare_inputs(flat, is_fp4=weight.is_fp4)
        return packed_fp8.multiply(codes.view(len(x), x.shape[1]), operand, x.dtype, splits=splits)
    inputs = packed_linear.prepare_inputs(flat, rounds=weight.rounds_inputs, is_fp4=weight.is_fp4)
    return packed_linear.multiply(inputs.view(x.shape), operand, splits=splits)


def _operand(weight: PackedMatrix, num_groups: int) -> Weight:
    """A matrix [G * O, K] as the kernels take it, in groups."""
    from antefix_kernels import packed_linear

    per_group = weight.shape[0] // num_groups
    rows, addends = weight.block
    scales = weight.scales
    if num_groups > 1 and per_group % rows:
        # A group begins in the middle of a block of scales, so each of its rows gets its own copy of the scales.
        scales = scales.view(torch.uint8 if scales.element_size() == 1 else scales.dtype)
        scales = scales.repeat_interleave(rows, 0)[: weight.shape[0]].view(weight.scales.dtype)
        rows = 1
    return packed_linear.Weight(
        codes=weight.codes.view(num_groups, per_group, -1),
        scales=scales.view(num_groups, -1, scales.shape[1]),
        block=(rows, addends),
    )


class PackedLinear(nn.Module):
    """Replaces an nn.Linear without bias; `weight` is a PackedMatrix."""

    codes: Tensor
    scales: Tensor

    def __init__(self, form: PackedForm, shape: torch.Size) -> None:
        super().__init__()
        self.form = form
        self.out_features, self.in_features = shape
        codes, scales = form.empty(shape)
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)

    @property
    def weight(self) -> PackedMatrix:
        return PackedMatrix(self.codes, self.scales, self.form.block, self.form.rounds_inputs)


class PackedStack(nn.Module):
    """Replaces the weights [E, O, K] of all experts: `stack[expert]` is a PackedMatrix."""

    codes: Tensor
    scales: Tensor

    def __init__(self, form: PackedForm, shape: torch.Size) -> None:
        super().__init__()
        self.form = form
        self.shape = shape
        codes, scales = form.empty(shape)
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, expert: int) -> PackedMatrix:
        return PackedMatrix(self.codes[expert], self.scales[expert], self.form.block, self.form.rounds_inputs)

    def card_tile(self, x: Tensor, num_rows: int) -> int:
        """How many rows a tile of the routed product has on a GPU, for `num_rows` picks."""
        from antefix_kernels import packed_fp8, packed_linear

        weight = self._operand()
        if takes_fp8(x, weight, rounds_inputs=self.form.rounds_inputs):
            return packed_fp8.routed_tile(weight, num_rows, x.device)
        return packed_linear.routed_tile(x, num_rows, weight)

    def card_product(self, x: Tensor, routing: Routing, *, gathered: bool, gate_limit: float | None = None) -> Tensor:
        """`antefix_kernels.linear.multiply_routed` with packed experts; with `gate_limit`, then `tokens.swiglu`."""
        from antefix_kernels import packed_fp8, packed_linear, tokens

        form, weight = self.form, self._operand()
        if takes_fp8(x, weight, rounds_inputs=form.rounds_inputs):
            rows = packed_fp8.prepare_inputs(x, is_fp4=form.is_fp4)
            return packed_fp8.multiply_routed(rows, weight, routing, x.dtype, gathered=gathered, gate_limit=gate_limit)
        inputs = packed_linear.prepare_inputs(x, rounds=form.rounds_inputs, is_fp4=form.is_fp4)
        out = packed_linear.multiply_routed(inputs, weight, routing, gathered=gathered)
        return out if gate_limit is None else tokens.swiglu(out, gate_limit)

    def _operand(self) -> Weight:
        from antefix_kernels.packed_linear import Weight

        return Weight(codes=self.codes, scales=self.scales, block=self.form.block)


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedForm:
    """How a weight is packed.  scale_dtype: float8_e8m0fnu or float32."""

    is_fp4: bool
    block: tuple[int, int]
    scale_dtype: torch.dtype
    rounds_inputs: bool = True

    @property
    def label(self) -> str:
        """The form's name in KV names and tables: "fp8 128x128 e8m0"."""
        kind = "fp4" if self.is_fp4 else "fp8"
        scale = "e8m0" if self.scale_dtype is torch.float8_e8m0fnu else "float32"
        return f"{kind} {self.block[0]}x{self.block[1]} {scale}"

    def plain_inputs(self) -> PackedForm:
        return replace(self, rounds_inputs=False)

    def code_shape(self, shape: torch.Size) -> torch.Size:
        return torch.Size((*shape[:-1], shape[-1] // 2)) if self.is_fp4 else shape

    def scale_shape(self, shape: torch.Size) -> torch.Size:
        rows, addends = self.block
        return torch.Size((*shape[:-2], -(-shape[-2] // rows), -(-shape[-1] // addends)))

    def empty(self, shape: torch.Size) -> tuple[Tensor, Tensor]:
        """Codes and scales of a packed weight, with uninitialised memory."""
        dtype = torch.uint8 if self.is_fp4 else torch.float8_e4m3fn
        codes = torch.empty(self.code_shape(shape), dtype=dtype)
        return codes, torch.empty(self.scale_shape(shape), dtype=self.scale_dtype)
