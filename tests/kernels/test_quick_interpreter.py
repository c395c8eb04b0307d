"""The interpreter that tests make faster patches Triton's language once per launch, and restores it."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

import triton
import triton.language as tl
from triton.runtime import interpreter

from tests.kernels.quick_interpreter import VERSION, PatchedOnce

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="on a card no kernel is interpreted"),
    pytest.mark.skipif(not triton.__version__.startswith(VERSION), reason="another Triton keeps its own interpreter"),
]


@triton.jit
def _tripled(x):
    return x + x + x


@triton.jit
def _sums_kernel(out, rows, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    total = tl.sum(tl.load(rows + at), 0)
    for _ in range(4):
        total = _tripled(total) + tl.max(at, 0)
    tl.store(out + tl.program_id(0), total)


def test_a_launch_patches_the_language_a_few_times_and_restores_it():
    patch = interpreter._patch_lang
    assert isinstance(patch, PatchedOnce)
    before, plain = patch.num_patches, tl.load
    rows, out = torch.arange(8, dtype=torch.int32), torch.zeros(5, dtype=torch.int32)
    for launch in (1, 2):
        _sums_kernel[(5,)](out, rows, SIZE=8)
        # The kernel sees `tl`, and Triton's functions see `tl.core` or both. They are called 50 times.
        assert 2 * launch <= patch.num_patches - before <= 3 * launch
        assert tl.load is plain
    want = 28
    for _ in range(4):
        want = 3 * want + 7
    assert out.tolist() == [want] * 5


def test_sizes_and_dtypes_are_those_of_each_operation():
    """Two shapes of one dtype, and two dtypes of one shape, share nothing that differs."""
    types = [tl.block_type(dtype, [4, size]) for dtype in (tl.int32, tl.float32) for size in (2, 8)]
    sizes = [(str(each.element_ty), each.numel) for each in types]
    assert sizes == [("int32", 8), ("int32", 32), ("fp32", 8), ("fp32", 32)]
    assert len({each.name for each in types}) == 4
    tensors = [tl.tensor(None, each) for each in (*types, *types)]
    assert [[size.value for size in each.shape] for each in tensors] == [[4, 2], [4, 8]] * 4
    assert [each.dtype for each in tensors] == [each.element_ty for each in types] * 2
