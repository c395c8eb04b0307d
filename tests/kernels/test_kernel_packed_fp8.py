"""Products on FP8 tensor cores agree with the decoded weight in float64, and a row's bits depend on no other row."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from antefix.model import packed
from antefix.model.packed import PackedForm, PackedMatrix, PackedStack
from antefix.model.packed import round_inputs as round_on_cpu
from antefix_kernels import linear, packed_fp8, packed_linear, tokens
from antefix_kernels.packed_fp8 import Tile
from antefix_kernels.packed_linear import Weight
from tests.kernels.test_kernel_packed import E8M0, close, draw_weight, normal, same, values
from tests.slow_cases import slow_but

FORMS = ("fp8", "fp8 float32", "fp4")
# The interpreter multiplies in float32. Tensor cores keep fewer bits of a sum of 32 to 128 addends.
EXACT, ON_CARD = 1e-6, 1e-3
TILES = (Tile(outputs=16, rows=32, warps=4, stages=3), Tile(outputs=128, rows=64, warps=8, stages=3))


def bound(device):
    return ON_CARD if device.type == "cuda" else EXACT


def product(x, weight, dtype=torch.float32, tile=None):
    inputs = packed_fp8.prepare_inputs(x, is_fp4=weight.is_fp4).view(len(x), 1)
    return packed_fp8.multiply(inputs, weight, dtype, tile=tile)[:, 0]


def scaled(inputs, *, is_fp4):
    """The values of prepared inputs, in the order of addends."""
    wide = inputs.codes.float().unflatten(1, (-1, 128)) * inputs.scales.unsqueeze(2)
    if not is_fp4:
        return wide.flatten(1)
    # In each group of 32 the even addends come first. Scales include a factor for the codes and the weights' scales.
    return (wide / packed_fp8._FP4_FACTOR).unflatten(2, (4, 2, 16)).mT.flatten(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_fp4", [False, True])
def test_inputs_are_the_codes_of_the_rounding_on_a_cpu(draw, dtype, is_fp4):
    sizes = torch.tensor([1e-6, 1e-3, 1, 40, 1e4], device=draw.device)[:, None].to(dtype)
    x = normal(draw, 5, 1152, dtype=dtype) * sizes
    x[0, :128] = 0
    assert torch.equal(scaled(packed_fp8.prepare_inputs(x, is_fp4=is_fp4), is_fp4=is_fp4).to(dtype), round_on_cpu(x))
    wide = normal(draw, 4, 512, dtype=dtype)[:, 256:]
    found = packed_fp8.prepare_inputs(wide, is_fp4=is_fp4)
    assert torch.equal(scaled(found, is_fp4=is_fp4).to(dtype), round_on_cpu(wide))


def test_what_is_no_number_stays_none(draw):
    x = normal(draw, 3, 256)
    x[0, 5], x[1, 200] = float("nan"), float("-inf")
    found = scaled(packed_fp8.prepare_inputs(x, is_fp4=True), is_fp4=True)
    assert torch.equal(found.isnan(), ~x.isfinite())
    assert torch.equal(found[2], round_on_cpu(x[2:])[0])


def test_no_rows_are_no_rows(draw):
    for form in FORMS:
        weight = draw_weight(draw, form, 1, 24, 128)
        assert product(normal(draw, 0, 128), weight).shape == (0, 24)


# Rows, addends, outputs: one row; outputs that are no multiple of a tile, and blocks that are no multiple of a step;
# addends that are cut into runs of which the last is shorter.
SHAPES = [(1, 128, 40), (37, 384, 70), (3, 1152, 20)]


@pytest.mark.parametrize(("n", "k", "o"), slow_but(SHAPES[:1], SHAPES))
@pytest.mark.parametrize("form", FORMS)
def test_products(draw, form, n, k, o):
    weight, x = draw_weight(draw, form, 1, o, k), normal(draw, n, k)
    close(product(x, weight), round_on_cpu(x).double() @ values(weight)[0].T, bound(draw.device))


@pytest.mark.parametrize("form", FORMS[:2])
def test_one_program_adds_up_runs_as_several_do(draw, form, monkeypatch):
    """All bits are equal, including the sign of a zero. Runs of unequal length are not joined."""
    for k, is_joined in ((2048, True), (1152, False)):
        weight, x = draw_weight(draw, form, 1, 24, k), normal(draw, 18, k)
        weight.codes[:, 3], weight.codes[:, 4] = 0, weight.codes[:, 5]
        x[1] = 0
        assert packed_linear.num_splits(weight) > 1
        apart = product(x, weight, torch.bfloat16)
        monkeypatch.setattr(packed_fp8, "_PROGRAMS_OF_ALL_RUNS", 1)
        assert packed_fp8.takes_all_runs(weight, packed_linear.num_splits(weight), 1) == is_joined
        joined = product(x, weight, torch.bfloat16)
        monkeypatch.undo()
        assert torch.equal(joined.view(torch.int16), apart.view(torch.int16))


def test_scales_of_the_whole_range_are_taken(draw):
    weight, x = draw_weight(draw, "fp4", 1, 24, 256), normal(draw, 4, 256)
    scales = torch.randint(0, 129, weight.scales.shape, generator=draw, device=draw.device).to(torch.uint8)
    scales[:, :8] = 0
    weight = Weight(codes=weight.codes, scales=scales.view(E8M0), block=weight.block)
    want = (round_on_cpu(x).double() @ values(weight)[0].T) * 2.0**100
    close(product(x, weight) * 2.0**50 * 2.0**50, want, bound(draw.device))
    tiny = product(x * 2.0**30, weight)[:, :8]
    close(tiny * 2.0**70, round_on_cpu(x * 2.0**30).double() @ values(weight)[0, :8].T * 2.0**70, bound(draw.device))


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_a_rows_product_does_not_depend_on_the_other_rows_nor_on_the_tile(draw, form):
    weight, x = draw_weight(draw, form, 1, 40, 256), normal(draw, 37, 256, dtype=torch.bfloat16)
    whole = product(x, weight, torch.bfloat16)
    same(product(x[3:4], weight, torch.bfloat16), whole[3:4])
    for tile in TILES:
        same(product(x, weight, torch.bfloat16, tile), whole)


@pytest.mark.slow
def test_groups_are_multiplied_apart(draw):
    weight, x = draw_weight(draw, "fp8", 3, 128, 128), normal(draw, 19, 3, 128)
    inputs = packed_fp8.prepare_inputs(x.view(57, 128), is_fp4=False).view(19, 3)
    want = torch.einsum("ngk,gok->ngo", round_on_cpu(x.view(57, 128)).view(19, 3, 128).double(), values(weight))
    close(packed_fp8.multiply(inputs, weight, torch.float32), want, bound(draw.device))


# Cases: experts without a row, one row, all rows on one expert.
ROUTINGS = [([[0, 2]], 4), ([[1]] * 70, 3), ([[0, 3], [1, 3], [0, 1]] * 3, 5)]


@pytest.mark.parametrize(("picks", "num_experts"), slow_but(ROUTINGS[:1], ROUTINGS))
@pytest.mark.parametrize("form", slow_but(FORMS[:1], FORMS))
def test_routed_rows_meet_their_experts(draw, form, picks, num_experts):
    experts = torch.tensor(picks, device=draw.device)
    num_tokens, picked = experts.shape
    weight, x = draw_weight(draw, form, num_experts, 48, 128), normal(draw, num_tokens, 128)
    routing = linear.route(experts, num_experts, tile=packed_fp8.routed_tile(weight, experts.numel(), x.device))
    inputs = packed_fp8.prepare_inputs(x, is_fp4=weight.is_fp4)
    got = packed_fp8.multiply_routed(inputs, weight, routing, torch.float32, gathered=True)
    each = torch.einsum("nk,npok->npo", round_on_cpu(x).double(), values(weight)[experts]).flatten(0, 1)
    close(got, each[routing.order], bound(draw.device))
    rows = packed_fp8.prepare_inputs(x[routing.order // picked], is_fp4=weight.is_fp4)
    same(packed_fp8.multiply_routed(rows, weight, routing, torch.float32, gathered=False), got)


@pytest.mark.slow
@pytest.mark.parametrize(("form", "dtype"), [("fp8", torch.float32), ("fp4", torch.bfloat16)])
def test_gates_are_those_of_two_kernels(draw, form, dtype):
    weight, x = draw_weight(draw, form, 2, 48, 128), normal(draw, 5, 128)
    experts = torch.tensor([[0], [0], [1], [0], [1]], device=draw.device)
    routing = linear.route(experts, 2, tile=packed_fp8.routed_tile(weight, 5, x.device))
    inputs = packed_fp8.prepare_inputs(x, is_fp4=weight.is_fp4)
    apart = packed_fp8.multiply_routed(inputs, weight, routing, dtype, gathered=True)
    gated = packed_fp8.multiply_routed(inputs, weight, routing, dtype, gathered=True, gate_limit=2.0)
    same(gated, tokens.swiglu(apart, 2.0))


@pytest.mark.slow
def test_other_ranks_rows_are_left_alone(draw):
    """A pick whose number is one after the last expert belongs to another rank."""
    weight, x = draw_weight(draw, "fp4", 2, 24, 128), normal(draw, 3, 128)
    experts = torch.tensor([[0, 2], [1, 2], [2, 2]], device=draw.device)
    routing = linear.route(experts, 3, tile=packed_fp8.routed_tile(weight, 6, x.device))
    inputs = packed_fp8.prepare_inputs(x, is_fp4=True)
    got = packed_fp8.multiply_routed(inputs, weight, routing, torch.float32, gathered=True)
    each = round_on_cpu(x).double()
    want = torch.stack([each[0] @ values(weight)[0].T, each[1] @ values(weight)[1].T])
    close(got[routing.place[[0, 2]]], want, bound(draw.device))


def test_what_does_not_fit_is_refused(draw):
    weight = draw_weight(draw, "fp4", 1, 8, 256)
    inputs = packed_fp8.prepare_inputs(normal(draw, 2, 256), is_fp4=True).view(2, 1)
    with pytest.raises(ValueError, match="no multiple of 128"):
        packed_fp8.prepare_inputs(normal(draw, 2, 160), is_fp4=True)
    with pytest.raises(ValueError, match="inputs have 256 addends, weights 128"):
        packed_fp8.multiply(inputs, draw_weight(draw, "fp4", 1, 8, 128), torch.float32)
    with pytest.raises(ValueError, match="not for these kernels"):
        packed_fp8.multiply(inputs, draw_weight(draw, "fp8 32x32", 1, 32, 256), torch.float32)
    with pytest.raises(ValueError, match="other numbers of groups"):
        packed_fp8.multiply(inputs, draw_weight(draw, "fp4", 2, 8, 256), torch.float32)
    assert packed_fp8.takes(weight)
    assert not packed_fp8.takes(draw_weight(draw, "fp4", 1, 8, 160))


@pytest.mark.slow
@pytest.mark.parametrize("is_fp4", [False, True])
def test_the_model_takes_them_where_they_are_switched_on(draw, monkeypatch, is_fp4):
    """The kernels take rounded inputs of BF16 models. Other inputs are multiplied in BF16."""
    form = PackedForm(is_fp4=is_fp4, block=(1, 32) if is_fp4 else (128, 128), scale_dtype=E8M0)
    weight = draw_weight(draw, "fp4" if is_fp4 else "fp8", 2, 128, 128)
    matrix = PackedMatrix(weight.codes[0], weight.scales[0], weight.block)
    stack = PackedStack(form, torch.Size((2, 128, 128)))
    stack.codes, stack.scales = weight.codes, weight.scales
    taken = []
    for name in ("multiply", "multiply_routed"):
        true = getattr(packed_fp8, name)
        monkeypatch.setattr(packed_fp8, name, lambda *a, true=true, **k: taken.append(true) or true(*a, **k))
    monkeypatch.setattr(packed_fp8, "runs_on", lambda x: True)
    monkeypatch.setattr(packed, "USES_FP8", False)
    x = normal(draw, 3, 1, 128, dtype=torch.bfloat16)
    before = packed.card_product(x, matrix)
    routing = linear.route(torch.tensor([[0], [1], [1]], device=draw.device), 2, tile=stack.card_tile(x[:, 0], 3))
    routed = stack.card_product(x[:, 0], routing, gathered=True, gate_limit=3.0)
    assert not taken
    monkeypatch.setattr(packed, "USES_FP8", True)
    close(packed.card_product(x, matrix), before.double(), 4e-3)
    routing = linear.route(torch.tensor([[0], [1], [1]], device=draw.device), 2, tile=stack.card_tile(x[:, 0], 3))
    close(stack.card_product(x[:, 0], routing, gathered=True, gate_limit=3.0), routed.double(), 1e-2)
    assert len(taken) == 2
    packed.card_product(x.float(), matrix)
    packed.card_product(x, PackedMatrix(weight.codes[0], weight.scales[0], weight.block, rounds_inputs=False))
    assert len(taken) == 2


@pytest.mark.slow
def test_both_ways_to_multiply_agree(draw):
    weight, x = draw_weight(draw, "fp4", 1, 40, 256), normal(draw, 9, 256, dtype=torch.bfloat16)
    rounded = packed_linear.prepare_inputs(x, rounds=True, is_fp4=True)
    close(product(x, weight, torch.bfloat16), packed_linear.multiply(rounded.unsqueeze(1), weight)[:, 0].double(), 4e-3)
