"""Products with packed weights agree with the decoded weight in float64, and a row's bits depend on no other row."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from antefix.model.packed import PackedForm, PackedMatrix
from antefix.model.packed import round_inputs as round_on_cpu
from antefix_kernels import linear, packed_linear
from antefix_kernels.packed_linear import Weight
from antefix_kernels.torch_reference import decode_weight
from tests.slow_cases import slow_but

E8M0 = torch.float8_e8m0fnu
FORMS = {
    "fp8": PackedForm(is_fp4=False, block=(128, 128), scale_dtype=E8M0),
    "fp8 float32": PackedForm(is_fp4=False, block=(128, 128), scale_dtype=torch.float32),
    "fp8 32x32": PackedForm(is_fp4=False, block=(32, 32), scale_dtype=E8M0),
    "fp4": PackedForm(is_fp4=True, block=(1, 32), scale_dtype=E8M0),
}
BOUND = {torch.float32: 1e-6, torch.bfloat16: 4e-3}


def draw_weight(draw, form, *shape):
    """A random weight with any codes except NaN, and scales of a plausible range."""
    form = FORMS[form]
    codes = torch.randint(0, 256, form.code_shape(torch.Size(shape)), generator=draw, device=draw.device)
    codes = codes.to(torch.uint8)
    if not form.is_fp4:
        codes = torch.where((codes & 127) == 127, 0, codes).view(torch.float8_e4m3fn)
    scales = torch.randint(110, 132, form.scale_shape(torch.Size(shape)), generator=draw, device=draw.device)
    scales = scales.to(torch.uint8).view(E8M0)
    if form.scale_dtype is torch.float32:
        scales = scales.float() * (1 + torch.rand(scales.shape, generator=draw, device=draw.device))
    return Weight(codes=codes, scales=scales, block=form.block)


def values(weight):
    return torch.stack([decode_weight(c, s, weight.block) for c, s in zip(weight.codes, weight.scales, strict=True)])


def close(got, want, bound):
    assert float((got.double() - want).norm()) <= bound * float(want.norm())


def same(got, want):
    """Whether bits are equal on a card. In the interpreter, a library's products depend slightly on a row's place."""
    assert torch.equal(got, want) if got.device.type == "cuda" else torch.allclose(got, want, 1e-2, 1e-4)


def normal(draw, *shape, dtype=torch.float32):
    return torch.randn(*shape, generator=draw, device=draw.device).to(dtype)


def unsplit(x):
    """Restore the order of columns, which has the even ones before the odd ones."""
    half = x.shape[-1] // 2
    return torch.stack((x[..., :half], x[..., half:]), -1).flatten(-2)


@pytest.mark.parametrize("form", FORMS)
def test_the_reference_decodes_what_the_model_decodes(draw, form):
    weight = draw_weight(draw, form, 1, 130, 160)
    matrix = PackedMatrix(weight.codes[0], weight.scales[0], weight.block)
    assert torch.equal(values(weight)[0].float(), matrix.decode(0, 130, torch.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [32, 1000, 1184])
def test_inputs_are_rounded_as_on_a_cpu(draw, dtype, width):
    x = normal(draw, 5, width, dtype=dtype) * torch.tensor([1e-6, 1e-3, 1, 40, 1e4], device=draw.device)[:, None].to(
        dtype
    )
    x[0, :32] = 0
    want = round_on_cpu(x)
    assert torch.equal(packed_linear.prepare_inputs(x, rounds=True, is_fp4=False), want)
    assert torch.equal(unsplit(packed_linear.prepare_inputs(x, rounds=True, is_fp4=True)), want)
    assert torch.equal(unsplit(packed_linear.prepare_inputs(x, rounds=False, is_fp4=True)), x)
    wide = normal(draw, 4, 2 * width, dtype=dtype)[:, width:]
    assert torch.equal(packed_linear.prepare_inputs(wide, rounds=True, is_fp4=False), round_on_cpu(wide))


# The last shape's addends are split.
SHAPES = [(torch.float32, 1, 32, 8), (torch.bfloat16, 40, 160, 70), (torch.float32, 3, 1056, 20)]


@pytest.mark.parametrize(("dtype", "n", "k", "o"), slow_but(SHAPES[:1], SHAPES))
@pytest.mark.parametrize("form", FORMS)
def test_products(draw, form, dtype, n, k, o):
    weight, x = draw_weight(draw, form, 1, o, k), normal(draw, n, k, dtype=dtype)
    is_fp4 = FORMS[form].is_fp4
    got = packed_linear.multiply(packed_linear.prepare_inputs(x, rounds=True, is_fp4=is_fp4).unsqueeze(1), weight)
    close(got[:, 0], round_on_cpu(x).double() @ values(weight)[0].T, BOUND[dtype])
    plain = packed_linear.multiply(packed_linear.prepare_inputs(x, rounds=False, is_fp4=is_fp4).unsqueeze(1), weight)
    close(plain[:, 0], x.double() @ values(weight)[0].T, BOUND[dtype])


@pytest.mark.parametrize("form", FORMS)
def test_a_rows_product_does_not_depend_on_the_other_rows(draw, form):
    weight, x = draw_weight(draw, form, 1, 24, 96), normal(draw, 70, 1, 96, dtype=torch.bfloat16)
    whole = packed_linear.multiply(x, weight)
    for start, stop in ((0, 1), (3, 40), (69, 70)):
        same(packed_linear.multiply(x[start:stop], weight), whole[start:stop])


@pytest.mark.parametrize("form", ["fp8", "fp8 float32"])
def test_groups_are_multiplied_apart(draw, form):
    weight, x = draw_weight(draw, form, 3, 128, 96), normal(draw, 19, 3, 96)
    close(packed_linear.multiply(x, weight), torch.einsum("ngk,gok->ngo", x.double(), values(weight)), 1e-6)


@pytest.mark.parametrize(("n", "num_experts", "picked"), slow_but([(1, 4, 2)], [(1, 4, 2), (37, 5, 3)]))
@pytest.mark.parametrize("form", FORMS)
def test_routed_rows_meet_their_experts(draw, form, n, num_experts, picked):
    weight, x = draw_weight(draw, form, num_experts, 40, 64), normal(draw, n, 64)
    experts = torch.rand(n, num_experts, generator=draw, device=draw.device).argsort(1)[:, :picked]
    is_fp4 = FORMS[form].is_fp4
    routing = linear.route(experts, num_experts, tile=packed_linear.routed_tile(x, n * picked, weight))
    prepared = packed_linear.prepare_inputs(x, rounds=False, is_fp4=is_fp4)
    got = packed_linear.multiply_routed(prepared, weight, routing, gathered=True)
    each = torch.einsum("nk,npok->npo", x.double(), values(weight)[experts]).flatten(0, 1)
    close(got, each[routing.order], 1e-6)
    rows = packed_linear.prepare_inputs(x[routing.order // picked], rounds=False, is_fp4=is_fp4)
    same(packed_linear.multiply_routed(rows, weight, routing, gathered=False), got)


def test_operands_that_do_not_fit_are_refused(draw):
    weight, x = draw_weight(draw, "fp4", 1, 8, 64), normal(draw, 2, 1, 64)
    with pytest.raises(ValueError, match="inputs have 32 addends, weights 64"):
        packed_linear.multiply(x[..., :32], weight)
    with pytest.raises(ValueError, match="scales must be"):
        packed_linear.multiply(x, Weight(codes=weight.codes, scales=weight.scales[:, :, :1], block=weight.block))
    with pytest.raises(ValueError, match="E8M0 scales over 32"):
        packed_linear.multiply(x, Weight(codes=weight.codes, scales=weight.scales.float(), block=weight.block))
    with pytest.raises(ValueError, match="other numbers of groups"):
        packed_linear.multiply(x.expand(2, 3, 64), weight)


@pytest.mark.slow
@pytest.mark.parametrize("release", ["flash", "base"])
def test_a_packed_layer_takes_the_kernels_on_a_card(tmp_path, monkeypatch, release):
    """Tests the model's own wiring in the interpreter, by pretending that the CPU has kernels."""
    from antefix.layout import KVFormat
    from antefix.model import load_model, moe, numerics
    from tests.model import released_checkpoint as released

    device = "cuda" if torch.cuda.is_available() else "cpu"
    path = released.write(release, tmp_path / release)
    layer = load_model(path, kv_format=KVFormat.FLOAT32).model.layers[2]
    draw = torch.Generator().manual_seed(3)
    x, heads = torch.randn(9, 128, generator=draw), torch.randn(9, 2, 128, generator=draw)
    tokens = torch.arange(9)
    want = layer.mlp(x, tokens), numerics.grouped_linear(heads, layer.self_attn.o_a_proj.weight)
    layer, x, heads, tokens = layer.to(device), x.to(device), heads.to(device), tokens.to(device)
    for module in (numerics, moe):
        monkeypatch.setattr(module, "has_kernels", lambda x: x.dtype in (torch.float32, torch.bfloat16))
    with torch.no_grad():
        got = layer.mlp(x, tokens), numerics.grouped_linear(heads, layer.self_attn.o_a_proj.weight)
    for one, other in zip(got, want, strict=True):
        # A sum in another order may round an input to the next step.
        close(one.cpu(), other.double(), 2e-2)
