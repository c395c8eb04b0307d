"""The numeric functions have right values, bits that do not depend on other rows, and gradients that training needs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from antefix.model.mhc import expand, sinkhorn
from antefix.model.moe import pick_experts
from antefix.model.numerics import (
    grouped_linear,
    linear,
    multiply,
    multiply_each,
    pad_rows,
    sigmoid,
    silu,
    softplus,
)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@settings(deadline=None, max_examples=40)
@given(
    width=st.sampled_from([1, 5, 10, 16, 24, 33, 96, 192, 250, 256, 257, 384, 513, 768, 1024]),
    out=st.sampled_from([1, 4, 24, 64, 192, 264]),
    start=st.integers(0, 300),
    num=st.integers(1, 100),
    num_threads=st.sampled_from([1, 2]),
)
def test_a_rows_product_does_not_depend_on_the_rows_beside_it(
    width: int, out: int, start: int, num: int, num_threads: int
) -> None:
    torch.set_num_threads(num_threads)
    x, weight = normal(400, width), normal(out, width, seed=1)
    whole = linear(x, weight)
    assert torch.equal(linear(x[start : start + num], weight), whole[start : start + num])
    torch.testing.assert_close(whole, F.linear(x, weight), rtol=1e-4, atol=1e-3)


def test_products_keep_leading_dims_and_take_transposed_weights() -> None:
    x, weight = normal(3, 5, 7, 40), normal(11, 40, seed=1)
    torch.testing.assert_close(linear(x, weight), F.linear(x, weight))
    torch.testing.assert_close(
        multiply(normal(16, 600), normal(600, 8)), normal(16, 600) @ normal(600, 8), rtol=1e-4, atol=1e-4
    )
    assert linear(normal(0, 40), weight).shape == (0, 11)


@settings(deadline=None, max_examples=30)
@given(
    width=st.sampled_from([16, 96, 128, 256, 272, 512, 1024]),
    out=st.sampled_from([1, 5, 16, 64, 128]),
    start=st.integers(0, 20),
    num=st.sampled_from([1, 2, 16]),
    num_threads=st.sampled_from([1, 2]),
)
def test_a_pairs_product_does_not_depend_on_the_pairs_beside_it(
    width: int, out: int, start: int, num: int, num_threads: int
) -> None:
    torch.set_num_threads(num_threads)
    # The layout is attention's: transposed entries.
    a, b = normal(40, 4, width), normal(40, out, width, seed=1).transpose(1, 2)
    whole = multiply_each(a, b)
    assert torch.equal(multiply_each(a[start : start + num], b[start : start + num]), whole[start : start + num])
    torch.testing.assert_close(whole, torch.bmm(a, b), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("width", [48, 96, 128, 192, 200, 512])
@pytest.mark.parametrize("rows", [1, 4, 5, 8, 13, 64])
def test_a_pairs_product_is_the_single_product(rows: int, width: int) -> None:
    # Decode steps run attention as pairs, prefill as single products. On a Xeon with AVX-512, pairs of 4 rows with 96
    # addends, and pairs of 8 rows with 192, were added up in another order.
    a, b = normal(3, rows, width), normal(3, 40, width, seed=1).mT
    for right in (b, b.contiguous()):
        pairs = multiply_each(a, right)
        assert all(torch.equal(pairs[i], multiply(a[i], right[i])) for i in range(3))


def test_grouped_products_are_block_diagonal() -> None:
    x, weight = normal(21, 3, 10), normal(12, 10, seed=1)
    want = torch.cat([x[:, g] @ weight[4 * g : 4 * g + 4].T for g in range(3)], dim=1).view(21, 3, 4)
    torch.testing.assert_close(grouped_linear(x, weight), want)
    with_grad = x.clone().requires_grad_()
    torch.testing.assert_close(grouped_linear(with_grad, weight).detach(), want)


def test_padding_adds_zero_rows_and_nothing_else() -> None:
    x = normal(5, 3)
    assert pad_rows(x).shape == (16, 3)
    assert torch.equal(pad_rows(x)[:5], x)
    assert not pad_rows(x)[5:].any()
    whole = normal(32, 3)
    assert pad_rows(whole) is whole


@pytest.mark.parametrize(("ours", "torchs"), [(sigmoid, torch.sigmoid), (silu, F.silu), (softplus, F.softplus)])
def test_activations_equal_torchs_to_rounding_and_do_not_depend_on_place(ours, torchs) -> None:  # type: ignore[no-untyped-def]
    x = torch.cat((normal(4001) * 5, torch.tensor([-1e4, -200.0, -89.0, -0.0, 0.0, 20.0, 20.1, 89.0, 200.0, 1e4])))
    torch.testing.assert_close(ours(x), torchs(x), rtol=1e-5, atol=1e-7)
    pieces = torch.cat([ours(piece) for piece in torch.split(x, 13)])
    assert torch.equal(ours(x), pieces)
    grad = x.clone().requires_grad_()
    ours(grad).sum().backward()
    assert grad.grad is not None
    assert torch.isfinite(grad.grad).all()


def test_sinkhorn_is_the_plain_iteration_and_nearly_doubly_stochastic() -> None:
    logits = normal(33, 4, 4) * 2
    want = logits.double().softmax(-1) + 1e-6
    want = want / (want.sum(-2, keepdim=True) + 1e-6)
    for _ in range(19):
        want = want / (want.sum(-1, keepdim=True) + 1e-6)
        want = want / (want.sum(-2, keepdim=True) + 1e-6)
    got = sinkhorn(logits, 20, 1e-6)
    torch.testing.assert_close(got, want.float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got.sum(-2), torch.ones(33, 4), rtol=0, atol=1e-4)
    torch.testing.assert_close(got.sum(-1), torch.ones(33, 4), rtol=0, atol=5e-2)


def test_streams_mix_over_combs_first_axis() -> None:
    streams, output, post, comb = normal(5, 4, 6), normal(5, 6, seed=1), normal(5, 4, seed=2), normal(5, 4, 4, seed=3)
    want = torch.einsum("njk,njd->nkd", comb, streams) + post[:, :, None] * output[:, None]
    torch.testing.assert_close(expand(streams, output, post, comb), want)


def test_equal_router_scores_pick_the_lowest_experts() -> None:
    scores = torch.tensor([[1.0, 3.0, 3.0, 3.0, 0.0], [2.0] * 5])
    assert pick_experts(scores, 2).tolist() == [[1, 2], [0, 1]]
    assert pick_experts(scores, 4).tolist() == [[0, 1, 2, 3], [0, 1, 2, 3]]
