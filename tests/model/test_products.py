"""Every product that a forward pass runs goes through `numerics`, in whole tiles, in a shape that the probe covers."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from antefix.layout import KVFormat
from antefix.model import numerics
from antefix.model.arithmetic import steps_of
from antefix.model.probe_steps import numbers
from tests.model.random_models import AWKWARD, bits, make, run_all
from tests.slow_cases import slow_but

PRODUCTS = {
    "mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_", "addbmm", "matmul", "linear", "mv", "addmv", "addmv_", "dot",
    "vdot", "inner", "ger", "outer", "einsum", "tensordot", "convolution", "mkldnn_linear", "_scaled_mm",
    "_addmm_activation", "_scaled_dot_product_attention",
}  # fmt: skip
# Sums whose columns several threads may divide between them.
SUMS = {"sum", "mean", "prod", "var", "std"}


class Seen(TorchDispatchMode):
    """Records every product's shape, and every product that breaks the rules."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[str, int, int]] = set()
        self.faults: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in PRODUCTS:
            self._product(name, [arg for arg in args if isinstance(arg, torch.Tensor)])
        elif name in SUMS and args[1:] and args[0].dim() - 1 not in {dim % args[0].dim() for dim in args[1]}:
            self.faults.add(f"{name} over a middle dim, called in {caller()}")
        return func(*args, **(kwargs or {}))

    def _product(self, name: str, operands: list[torch.Tensor]) -> None:
        if caller() != numerics.__file__:
            self.faults.add(f"{name} called in {caller()}")
            return
        a, b = operands[-2:]
        if a.dim() == 2:
            rules = (a.shape[0] % numerics.ROW_TILE, a.shape[1] % numerics.ALIGN, b.shape[1] % numerics.COLUMN_TILE)
            kind = "product"
        else:
            rules = (a.shape[1] % numerics.PAIR_ROWS, 0, b.shape[2] % numerics.COLUMN_TILE)
            kind = f"pairs of {a.shape[1]}"
        if any(rules) or a.shape[-1] > numerics.SUM_TILE:
            self.faults.add(f"{name} of {tuple(a.shape)} by {tuple(b.shape)}")
        self.shapes.add((kind, a.shape[-1], b.shape[-1]))


def caller() -> str:
    """The file, outside PyTorch and this test, that called an operation."""
    frame: Any = sys._getframe(2)
    while frame and ("/torch/" in frame.f_code.co_filename or frame.f_code.co_filename == __file__):
        frame = frame.f_back
    return frame.f_code.co_filename if frame else ""


@pytest.mark.parametrize(
    ("name", "kv_format"),
    slow_but(
        [("plain", KVFormat.FP8), ("odd everywhere", KVFormat.FLOAT32)],
        [*((name, KVFormat.FP8) for name in AWKWARD), ("odd everywhere", KVFormat.FLOAT32)],
    ),
)
def test_every_product_of_a_forward_pass_is_a_sanctioned_one(name: str, kv_format: KVFormat) -> None:
    model = make(name, kv_format=kv_format)
    with Seen() as seen:
        run_all(model)
    assert not seen.faults
    # The probe must also have run every tile of these products.
    with torch.inference_mode(), Seen() as probed:
        for step in steps_of(model):
            step.run(numbers((min(step.shape[0], 16), *step.shape[1:]), 0, step.dtype), 0)
    assert seen.shapes
    assert not seen.shapes - probed.shapes


@pytest.mark.parametrize(
    "product",
    [
        lambda x: torch.mm(x, x.T),
        lambda x: x @ x.T,
        lambda x: torch.einsum("ij,kj->ik", x, x),
        lambda x: torch.nn.functional.linear(x, x),
        lambda x: torch.baddbmm(x[None], x[None], x[None]),
        lambda x: torch.addmm(x, x, x),
        lambda x: x.view(2, 8, 16).sum(1),
    ],
)
def test_a_bare_product_is_refused(product: Callable[[torch.Tensor], torch.Tensor]) -> None:
    with torch.inference_mode(), Seen() as seen:
        product(torch.ones(16, 16))
    assert seen.faults


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", slow_but(["plain", "three streams"], AWKWARD))
def test_bits_depend_neither_on_place_nor_on_threads(name: str, threads: Callable[[int], None]) -> None:
    model = make(name)
    threads(1)
    whole = bits(model, num_tokens=36)
    for num_threads, cuts, others in ((1, (21,), 0), (2, (1, 16, 33), 1), (3, (30,), 0), (4, (33, 34, 35), 4)):
        threads(num_threads)
        assert bits(model, cuts, num_tokens=36, others=others) == whole, (num_threads, cuts, others)


@pytest.mark.parametrize("num_columns", [1, 5, 7, 9, 11, 24, 40, 264, 513, 1000])
@pytest.mark.parametrize("num_addends", [8, 17, 20, 33, 192, 300])
def test_a_product_is_one_chain_for_any_number_of_threads(
    num_columns: int, num_addends: int, threads: Callable[[int], None]
) -> None:
    x, weight = numbers((48, num_addends), 1, torch.float32), numbers((num_columns, num_addends), 2, torch.float32)
    threads(1)
    whole = numerics.linear(x, weight)
    torch.testing.assert_close(whole, x @ weight.T, rtol=1e-4, atol=1e-4)
    for num_threads in (1, 2, 3, 4, 8):
        threads(num_threads)
        for start, stop in ((0, 1), (5, 8), (3, 20), (16, 48)):
            assert torch.equal(numerics.linear(x[start:stop], weight), whole[start:stop])
