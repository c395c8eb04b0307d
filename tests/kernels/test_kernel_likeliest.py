"""The likeliest token is torch's, and rows that have no numbers are found."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from antefix_kernels.likeliest import likeliest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 1000, 5000])
def test_the_first_of_the_largest_logits(draw, dtype, size):
    # Many logits are equal.
    logits = torch.randint(-30, 30, (3, size), generator=draw, device=draw.device).to(dtype)
    tokens, are_numbers = likeliest(logits)
    assert torch.equal(tokens, logits.argmax(1)) and are_numbers.all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_rows_with_something_else_than_numbers(draw, bad):
    logits = torch.randn(3, 2050, generator=draw, device=draw.device)
    logits[1, 2049] = bad
    logits[2] = bad
    tokens, are_numbers = likeliest(logits)
    assert are_numbers.tolist() == [True, False, False]
    assert ((tokens >= 0) & (tokens < 2050)).all()
