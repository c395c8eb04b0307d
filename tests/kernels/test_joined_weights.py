"""Products with joined weights have the bits of the products with each weight alone.

Weights have whole tiles of 64 outputs, because the interpreter's sums depend slightly on an output's place in its tile.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

pytest.importorskip("triton", reason="Triton is not installed")

from antefix.model import joined_weights, numerics
from antefix.model.packed import PackedLinear, card_splits
from benchmarks.drawn_flash import FORMS, draw_codes, draw_scales


@pytest.fixture
def kernels(monkeypatch):
    """Products run in kernels, wherever their operands are."""
    for module in (numerics, joined_weights):
        monkeypatch.setattr(module, "has_kernels", lambda _: True)


def plain(draw, outputs, addends=64):
    module = nn.Linear(addends, outputs, bias=False)
    module.weight = nn.Parameter(torch.randn(outputs, addends, generator=draw), requires_grad=False)
    return module


def packed(draw, outputs, addends=256, form="fp8"):
    module = PackedLinear(FORMS[form], torch.Size((outputs, addends)))
    module.codes = draw_codes(module.codes.shape, is_fp4=form == "fp4", generator=draw)
    module.scales = draw_scales(module.scales.shape, FORMS[form], addends, draw)
    return module


@pytest.mark.usefixtures("kernels")
def test_plain_weights(draw):
    modules = [plain(draw, outputs) for outputs in (64, 128, 64)]
    x = torch.randn(5, 64, generator=draw)
    want = [numerics.linear(x, module.weight) for module in modules]
    for _ in range(2):
        done = joined_weights.joined_products(x, modules)
        for module, alone in zip(modules, want, strict=True):
            assert torch.equal(joined_weights.product_of(x, module, done), alone)
            assert torch.equal(numerics.linear(x, module.weight), alone)
    assert modules[1].weight.data_ptr() == modules[0].weight.data_ptr() + 64 * 64 * 4


@pytest.mark.usefixtures("kernels")
def test_a_replaced_weight_is_joined_again(draw):
    modules = [plain(draw, 64), plain(draw, 64)]
    x = torch.randn(3, 64, generator=draw)
    joined_weights.joined_products(x, modules)
    modules[1].weight = nn.Parameter(torch.randn(64, 64, generator=draw), requires_grad=False)
    want = numerics.linear(x, modules[1].weight)
    assert torch.equal(joined_weights.joined_products(x, modules)[modules[1]], want)


@pytest.mark.usefixtures("kernels")
def test_packed_weights_whose_sums_are_split_alike(draw):
    modules = [packed(draw, 128), packed(draw, 128)]
    assert [card_splits(module.weight) for module in modules] == [1, 1]
    x = torch.randn(3, 256, generator=draw).bfloat16()
    want = [numerics.linear(x, module.weight) for module in modules]
    done = joined_weights.joined_products(x, modules)
    assert set(done) == set(modules)
    for module, alone in zip(modules, want, strict=True):
        assert torch.equal(done[module], alone)
        assert torch.equal(numerics.linear(x, module.weight), alone)


@pytest.mark.usefixtures("kernels")
def test_weights_whose_inputs_are_no_longer_rounded(draw):
    modules = [packed(draw, 128), packed(draw, 128)]
    x = torch.randn(3, 256, generator=draw).bfloat16()
    rounded = joined_weights.joined_products(x, modules)
    for module in modules:
        module.form = module.form.plain_inputs()
    done = joined_weights.joined_products(x, modules)
    for module in modules:
        assert torch.equal(done[module], numerics.linear(x, module.weight))
        assert not torch.equal(done[module], rounded[module])


@pytest.mark.usefixtures("kernels")
def test_a_change_of_form_moves_no_weight(draw):
    """Recorded CUDA graphs read weights where they lay when the step was recorded."""
    modules = [packed(draw, 128), packed(draw, 128)]
    forms = [module.form for module in modules]
    x = torch.randn(3, 256, generator=draw).bfloat16()
    before = joined_weights.joined_products(x, modules)
    places = [(module.codes.data_ptr(), module.scales.data_ptr()) for module in modules]
    modules[0].form = modules[0].form.plain_inputs()
    assert joined_weights.joined_products(x, modules) == {}
    modules[1].form = modules[1].form.plain_inputs()
    assert set(joined_weights.joined_products(x, modules)) == set(modules)
    for module, form in zip(modules, forms, strict=True):
        module.form = form
    done = joined_weights.joined_products(x, modules)
    assert [(module.codes.data_ptr(), module.scales.data_ptr()) for module in modules] == places
    assert all(torch.equal(done[module], before[module]) for module in modules)


@pytest.mark.usefixtures("kernels")
def test_weights_that_are_trained_stay_their_optimizers(draw):
    modules = [plain(draw, 64), plain(draw, 64)]
    weights = [module.weight.requires_grad_() for module in modules]
    with torch.no_grad():
        assert joined_weights.joined_products(torch.randn(2, 64, generator=draw), modules) == {}
    assert all(module.weight is weight for module, weight in zip(modules, weights, strict=True))


@pytest.mark.usefixtures("kernels")
def test_a_packed_and_a_plain_weight_have_no_product_together(draw):
    for modules in ([packed(draw, 128), plain(draw, 128, 256)], [plain(draw, 128, 256), packed(draw, 128)]):
        assert joined_weights.joined_product(torch.randn(2, 256, generator=draw), modules) is None


@pytest.mark.usefixtures("kernels")
def test_weights_that_do_not_fit_together_stay_apart(draw):
    x = torch.randn(2, 256, generator=draw).bfloat16()
    assert joined_weights.joined_products(x, [packed(draw, 128), packed(draw, 128, form="fp8 float32")]) == {}
    assert joined_weights.joined_products(x, [packed(draw, 128), packed(draw, 100)]) == {}
    assert joined_weights.joined_products(x, [packed(draw, 128)]) == {}


def test_nothing_is_joined_without_kernels(draw):
    modules = [plain(draw, 64), plain(draw, 64)]
    assert joined_weights.joined_products(torch.randn(2, 64, generator=draw), modules) == {}
