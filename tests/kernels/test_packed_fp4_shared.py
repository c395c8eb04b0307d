"""The candidate for FP4 products agrees with the decoded weight in float64, and a row's bits depend on no other row."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from antefix.model.packed import round_inputs as round_on_cpu
from antefix_kernels import linear, packed_fp4_shared, packed_fp8, tokens
from antefix_kernels.packed_fp8 import Tile
from tests.kernels.test_kernel_packed import close, draw_weight, normal, same, values
from tests.kernels.test_kernel_packed_fp8 import bound

TILE = Tile(outputs=32, rows=32, warps=4, stages=2)


def run(x, weight, picks, **settings):
    routing = linear.route(picks, len(weight.codes), tile=TILE.rows)
    inputs = packed_fp8.prepare_inputs(x, is_fp4=True)
    out = packed_fp4_shared.multiply_routed(
        inputs, weight, routing, torch.float32, gathered=True, tile=TILE, **settings
    )
    return out[routing.place].view(*picks.shape, -1)


@pytest.mark.parametrize("addends", [128, 256])
def test_scales_of_a_block_enter_the_codes(draw, addends):
    weight, x = draw_weight(draw, "fp4", 3, 48, addends), normal(draw, 7, addends)
    # Scales as far apart as allowed, and zeros, which no power of two changes.
    scales = weight.scales.view(torch.uint8)
    scales.copy_(torch.randint(116, 128, scales.shape, generator=draw, device=scales.device))
    weight.codes.view(torch.uint8)[:, ::3, ::2] = 0x88
    picks = torch.randint(0, 3, (7, 2), generator=draw, device=x.device)
    assert packed_fp4_shared.takes(weight)
    want = torch.einsum("nk,npok->npo", round_on_cpu(x).double(), values(weight)[picks])
    whole = run(x, weight, picks)
    close(whole.flatten(0, 1), want.flatten(0, 1), bound(draw.device))
    same(run(x[2:3], weight, picks[2:3]), whole[2:3])
    gated = run(x, weight, picks, gate_limit=2.0)
    close(gated.flatten(0, 1), tokens.swiglu(whole.flatten(0, 1), 2.0), 1e-6)


def test_scales_too_far_apart_are_not_taken(draw):
    weight = draw_weight(draw, "fp4", 1, 16, 256)
    scales = weight.scales.view(torch.uint8)
    scales.fill_(120)
    # Scales may be further apart in different blocks of 128 addends.
    scales[0, 3, 0] = 105
    assert not packed_fp4_shared.takes(weight)
    scales[0, 3, :4] = 105
    assert packed_fp4_shared.takes(weight)
