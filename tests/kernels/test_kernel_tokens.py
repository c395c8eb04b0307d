"""Per-token kernels agree with plain torch, and a token's bits depend on no other token."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from antefix_kernels import linear, tokens
from tests.slow_cases import slow_but


def close(got, want, bound):
    assert got.dtype == want.dtype or want.dtype is torch.float64
    assert float((got.double() - want.double()).norm()) <= bound * float(want.double().norm())


def same(got, want):
    """Whether bits are equal on a card. In the interpreter, a library's products depend slightly on a row's place."""
    assert torch.equal(got, want) if got.device.type == "cuda" else torch.allclose(got, want, 1e-2, 1e-4)


def normal(draw, *shape, dtype=torch.float32):
    return torch.randn(*shape, generator=draw, device=draw.device).to(dtype)


BOUND = {torch.float32: 1e-6, torch.bfloat16: 4e-3}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "k", "o"), [(1, 16, 24), (70, 33, 130), (130, 96, 8)])
def test_products(draw, dtype, n, k, o):
    x, weight = normal(draw, n, k, dtype=dtype), normal(draw, o, k, dtype=dtype)
    close(linear.multiply(x, weight), x.double() @ weight.double().T, BOUND[dtype])
    wide = normal(draw, n, 3 * k, dtype=dtype)[:, k : 2 * k]
    close(linear.multiply(wide, weight), wide.double() @ weight.double().T, BOUND[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rows_product_does_not_depend_on_the_other_rows(draw, dtype):
    x, weight = normal(draw, 200, 80, dtype=dtype), normal(draw, 40, 80, dtype=dtype)
    whole = linear.multiply(x, weight)
    for start, stop in ((0, 1), (3, 20), (100, 200), (199, 200)):
        same(linear.multiply(x[start:stop], weight), whole[start:stop])


@pytest.mark.parametrize("k", [32, 40])
def test_rows_that_are_left_out_change_no_other(draw, monkeypatch, k):
    x, weight = (torch.randn(n, k, generator=draw, device=draw.device) for n in (3, 70))
    stack = torch.randn(4, 70, k, generator=draw, device=draw.device)
    routing = linear.route(torch.tensor([[1, 3], [1, 0], [1, 2]], device=draw.device), 4)
    got = linear.multiply(x, weight), linear.multiply_routed(x, stack, routing, gathered=True)
    monkeypatch.setattr(linear, "SKIPS_MISSING_ROWS", False)
    want = linear.multiply(x, weight), linear.multiply_routed(x, stack, routing, gathered=True)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])


@pytest.mark.parametrize("k", [128, 40])
def test_few_rows_have_the_bits_of_many_rows_kernel(draw, monkeypatch, k):
    x, weights = normal(draw, 3, 2, k, dtype=torch.bfloat16), normal(draw, 2, 70, k, dtype=torch.bfloat16)
    stack = normal(draw, 4, 70, k, dtype=torch.bfloat16)
    routing = linear.route(torch.tensor([[1, 3], [1, 0], [1, 2]], device=draw.device), 4)

    def products():
        inner = linear.multiply_routed(x[:, 0], stack, routing, gathered=True)
        outer = normal(draw.set_state(state), 4, 24, 70, dtype=torch.bfloat16)
        return linear.multiply_groups(x, weights), inner, linear.multiply_routed(inner, outer, routing, gathered=False)

    state = draw.get_state()
    few = products()
    monkeypatch.setattr(linear, "FEW_ROWS", False)
    for got, want in zip(few, products(), strict=True):
        same(got, want)


def test_groups_are_multiplied_apart(draw):
    x, weights = normal(draw, 19, 3, 40), normal(draw, 3, 24, 40)
    close(linear.multiply_groups(x, weights), torch.einsum("ngk,gok->ngo", x.double(), weights.double()), 1e-6)


@pytest.mark.parametrize(("n", "num_experts", "picked"), slow_but([(1, 4, 2)], [(1, 4, 2), (37, 5, 3), (90, 2, 1)]))
def test_routed_rows_meet_their_experts(draw, n, num_experts, picked):
    x, inner = normal(draw, n, 32), normal(draw, num_experts, 24, 32)
    outer, shared = normal(draw, num_experts, 48, 24), normal(draw, n, 48)
    experts = torch.rand(n, num_experts, generator=draw, device=draw.device).argsort(1)[:, :picked]
    weights = torch.rand(n, picked, generator=draw, device=draw.device)

    def run(rows):
        routing = linear.route(experts[rows], num_experts)
        hidden = linear.multiply_routed(x[rows], inner, routing, gathered=True)
        done = linear.multiply_routed(hidden, outer, routing, gathered=False)
        return tokens.combine(done, routing.place, weights[rows].contiguous(), shared[rows].contiguous())

    whole = run(slice(0, n))
    each = torch.einsum("npi,npdi->npd", torch.einsum("nk,npik->npi", x, inner[experts]), outer[experts])
    close(whole, shared.double() + (weights.unsqueeze(2).double() * each.double()).sum(1), 1e-5)
    same(run(slice(n // 2, n)), whole[n // 2 :])


def test_an_expert_that_nobody_picked_does_no_harm(draw):
    experts = torch.full((5, 1), 2, device=draw.device)
    x, weights = normal(draw, 5, 16), normal(draw, 4, 16, 16)
    close(
        linear.multiply_routed(x, weights, linear.route(experts, 4), gathered=True),
        x.double() @ weights[2].T.double(),
        1e-6,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "columns", "rope"), [(1, 96, 24), (3, 32, 8), (2, 24, 0)])
def test_norm_and_turn(draw, dtype, heads, columns, rope):
    x, weight = normal(draw, 7, heads, columns, dtype=dtype), normal(draw, columns)
    angles = normal(draw, 7, rope // 2)
    cos, sin = (angles.cos(), angles.sin()) if rope else (None, None)
    got = tokens.norm_turn(x, weight=weight, eps=1e-6, cos=cos, sin=sin, scale=0.5)
    wide = x.double()
    want = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6) * weight.double()
    if rope:
        even, odd = want[..., -rope:].unflatten(-1, (-1, 2)).unbind(-1)
        c, s = cos.double().unsqueeze(1), sin.double().unsqueeze(1)
        turned = torch.stack((even * c - odd * s, odd * c + even * s), -1).flatten(-2)
        want = torch.cat((want[..., :-rope], turned), -1)
    close(got, want * 0.5, BOUND[dtype])
    assert torch.equal(tokens.norm_turn(x[3:4], weight=weight, eps=1e-6, cos=cos if cos is None else cos[3:4],
                                        sin=sin if sin is None else sin[3:4], scale=0.5), got[3:4])  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_halves_are_rounded_to_the_models_type_first(draw, dtype):
    x, angles = normal(draw, 5, 2, 32, dtype=dtype), normal(draw, 5, 4)
    given = {"eps": 1e-6, "cos": angles.cos(), "sin": angles.sin(), "scale": 0.3}
    assert torch.equal(tokens.norm_turn(x, halves=True, **given), tokens.norm_turn(x, **given).half())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mixing_in_two_programs_per_token_has_the_bits_of_one(draw, monkeypatch, dtype):
    streams, fn, base, scale = (
        normal(draw, 3, 4, 40, dtype=dtype),
        normal(draw, 24, 160),
        normal(draw, 24),
        normal(draw, 3),
    )
    norm = normal(draw, 40, dtype=dtype), 1e-6

    def mixed():
        return tokens.mixed(streams, fn, base, scale, iterations=4, eps=1e-6, norm_eps=1e-6, norm=norm)

    apart = mixed()
    monkeypatch.setattr(tokens, "_MIX_APART_TOKENS", 2)
    for got, want in zip(apart, mixed(), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize(("num_streams", "width"), [(4, 40), (2, 32)])
def test_mixing(draw, num_streams, width):
    from antefix.model.mhc import sinkhorn

    streams = normal(draw, 35, num_streams, width)
    num_logits = (2 + num_streams) * num_streams
    fn, base, scale = normal(draw, num_logits, num_streams * width), normal(draw, num_logits), normal(draw, 3)
    logits = tokens.mixing_logits(streams, fn, 1e-6)
    flat = streams.flatten(1).double()
    close(logits, flat @ fn.double().T * torch.rsqrt(flat.square().mean(1, keepdim=True) + 1e-6), 1e-5)
    pre, post, comb = tokens.mixing_gates(logits, base, scale, num_streams, 6, 1e-6)
    a, b, c = torch.split(logits, [num_streams, num_streams, num_streams**2], 1)
    a_base, b_base, c_base = torch.split(base, [num_streams, num_streams, num_streams**2])
    close(pre, torch.sigmoid(a * scale[0] + a_base) + 1e-6, 1e-6)
    close(post, 2 * torch.sigmoid(b * scale[1] + b_base), 1e-6)
    close(comb, sinkhorn((c * scale[2] + c_base).view(-1, num_streams, num_streams), 6, 1e-6), 1e-5)
    close(tokens.collapse(streams, pre), torch.einsum("nm,nmd->nd", pre, streams), 1e-6)
    update = normal(draw, 35, width)
    want = torch.einsum("nij,nid->njd", comb, streams) + post.unsqueeze(2) * update.unsqueeze(1)
    close(tokens.expand(streams, update, post, comb), want, 1e-6)
    alone = tokens.mixing_logits(streams[30:31].contiguous(), fn, 1e-6)
    same(alone, logits[30:31])
    for one, of in zip(tokens.mixing_gates(alone, base, scale, num_streams, 6, 1e-6), (pre, post, comb), strict=True):
        same(one, of[30:31])


def test_swiglu(draw):
    gate_up = normal(draw, 9, 48) * 8
    gate, up = gate_up.chunk(2, 1)
    close(tokens.swiglu(gate_up, 10.0), torch.nn.functional.silu(gate.clamp(max=10)) * up.clamp(-10, 10), 1e-6)


@pytest.mark.parametrize(
    ("num_streams", "width", "dtype"),
    [(4, 40, torch.float32), (2, 32, torch.bfloat16), (3, 24, torch.float32)],
)
def test_mixing_in_two_launches(draw, num_streams, width, dtype):
    streams = normal(draw, 19, num_streams, width, dtype=dtype)
    num_logits = (2 + num_streams) * num_streams
    fn, base, scale = normal(draw, num_logits, num_streams * width), normal(draw, num_logits), normal(draw, 3)
    weight, settings = normal(draw, width), {"iterations": 6, "eps": 1e-6, "norm_eps": 1e-5}
    logits = tokens.mixing_logits(streams, fn, 1e-5)
    pre, *gates = tokens.mixing_gates(logits, base, scale, num_streams, 6, 1e-6)
    want = tokens.collapse(streams, pre)
    got = tokens.mixed(streams, fn, base, scale, **settings)
    for one, other in zip(got, (want, *gates), strict=True):
        close(one, other, BOUND[dtype])
    normed = tokens.mixed(streams, fn, base, scale, **settings, norm=(weight, 1e-3))
    close(normed[0], tokens.norm_turn(want.unsqueeze(1), weight=weight, eps=1e-3).squeeze(1), BOUND[dtype])
    alone = tokens.mixed(streams[17:18].contiguous(), fn, base, scale, **settings, norm=(weight, 1e-3))
    for one, of in zip(alone, normed, strict=True):
        same(one, of[17:18])


def test_turning_back(draw):
    x, angles = normal(draw, 3, 2, 24, dtype=torch.bfloat16), normal(draw, 3, 4)
    cos, sin = angles.cos(), angles.sin()
    assert torch.equal(tokens.norm_turn(x, cos=cos, sin=sin, back=True), tokens.norm_turn(x, cos=cos, sin=-sin))
