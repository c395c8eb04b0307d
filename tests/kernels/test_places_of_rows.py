"""A row's bits must not depend on its place. Tests how kernels are launched, what runs between them, and whole steps.

If the compiler may fuse multiplications and additions, one kernel rounds `a * b - c * d` in two ways, depending on a
row's place in its tile (seen on an H200 with Triton 3.6, for queries of three heads of 24 dims).
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton", reason="Triton is not installed")

import antefix_kernels
from antefix.layout import KVFormat
from antefix.model import Model, ModelConfig, Sequence, WindowState, forward, mhc, moe, norms_rope, numerics, triton_ops
from antefix.model.backend import uses_triton
from antefix.model.card_pool import CardPool
from antefix.model.card_steps import card_steps
from antefix.model.probe_steps import numbers
from antefix.model.triton_ops import TritonOps
from antefix_console.verify.drawn_models import drawn_subject
from antefix_kernels import gather, index_queries, index_scores, linear, pack, prefill_attention, tokens
from tests.model.random_models import SMALL, C, H
from tests.model.step_traces import first_difference, trace

# Reproducible mode runs none of these kernels, which read packed records in parts for few queries.
OF_DEFAULT_MODE_ALONE = {"_attend_kernel", "attend_kernel", "_decode_kernel", "decode_kernel", "prefill_kernel",
                         "_merge_kernel"}  # fmt: skip
# Sums and products of several numbers, which a library computes in an order that depends on the shape.
REDUCTIONS = {
    "mm", "addmm", "bmm", "baddbmm", "matmul", "linear", "mv", "dot", "einsum", "convolution", "sum", "mean", "prod",
    "var", "std", "norm", "linalg_vector_norm", "logsumexp", "_softmax", "_log_softmax", "cumsum", "cumprod",
    "native_layer_norm", "_scaled_dot_product_attention", "index_add", "scatter_add", "scatter_reduce",
}  # fmt: skip


def launches(path: Path) -> Iterator[tuple[str, ast.Call]]:
    """(kernel's name, call) of each launch `kernel[grid](...)` in a module."""
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.Call(func=ast.Subscript(value=ast.Name(id=name))) if name.endswith("kernel"):
                yield name, node


def says_unfused(call: ast.Call, module: str) -> bool:
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    if "enable_fp_fusion" in given:
        return isinstance(given["enable_fp_fusion"], ast.Constant) and given["enable_fp_fusion"].value is False
    # The setting is passed in a dictionary.
    return None in given and '"enable_fp_fusion": False' in module


def test_no_kernel_of_reproducible_mode_lets_the_compiler_fuse_as_it_likes() -> None:
    seen = set()
    for path in Path(antefix_kernels.__path__[0]).glob("*.py"):
        for name, call in launches(path):
            seen.add(name)
            is_free = name in OF_DEFAULT_MODE_ALONE
            assert is_free or says_unfused(call, path.read_text()), f"{path.name}: {name} at line {call.lineno}"
    assert seen > OF_DEFAULT_MODE_ALONE
    assert {"_norm_turn_kernel", "_product_kernel", "rows_kernel", "_prefill_kernel"} <= seen


class Between(TorchDispatchMode):
    """Records reductions of floats that run as PyTorch's own operations."""

    def __init__(self) -> None:
        super().__init__()
        self.faults: set[str] = set()
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.calls += 1
        tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
        if name.rstrip("_") in REDUCTIONS | {"softmax"} and tensors and tensors[0].is_floating_point():
            self.faults.add(f"{name} of {[tuple(tensor.shape) for tensor in tensors]}")
        return func(*args, **(kwargs or {}))


@pytest.fixture
def as_on_a_card(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """Per-token steps run as kernels in the interpreter.

    Fewer queries are required, because 256 would take too long.
    """
    if device.type != "cpu":
        pytest.skip("on a card the other tests of this file run the real thing")
    for module in (numerics, norms_rope, mhc, moe):
        monkeypatch.setattr(module, "has_kernels", lambda x: x.dtype in (torch.float32, torch.bfloat16))
    monkeypatch.setattr(triton_ops, "REPRODUCIBLE_QUERIES_MIN", 16)


def small(**changes: Any) -> Model:
    odd = {"hidden_size": 20, "head_dim": 24, "num_attention_heads": 3, "o_groups": 3, "index_head_dim": 64}
    fields = SMALL | odd | {"vocab_size": 17} | changes
    model = Model(ModelConfig.from_dict(fields), kv_format=KVFormat.FP8).requires_grad_(False).eval()
    for number, weight in enumerate(model.parameters()):
        weight.copy_(numbers(tuple(weight.shape), number, weight.dtype) * weight.shape[-1] ** -0.5)
    return model


class NotRun:
    """Replaces a kernel whose results are not needed, because the interpreter is slow."""

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return lambda *args, **kwargs: None


@pytest.mark.slow
@pytest.mark.usefixtures("as_on_a_card")
def test_between_kernels_nothing_is_summed(monkeypatch: pytest.MonkeyPatch) -> None:
    # Replace all kernels except the one that gives indices.
    for module in (gather, index_queries, index_scores, linear, pack, prefill_attention, tokens):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, NotRun())
    model = small(layer_types=[C, H], num_hidden_layers=2, compress_rates={C: 2, H: 3}, sliding_window=3, index_topk=9,
                  index_n_heads=2, hc_sinkhorn_iters=1, num_hash_layers=0)  # fmt: skip
    pool, ops = CardPool(model.layout, 3, "cpu"), TritonOps(model.layout, reproducible=True)
    sequence = Sequence(pool.allocate(3), WindowState.zeros(model.layout, 0))
    with Between() as seen:
        for piece in np.split(np.arange(7, dtype="<u4"), [6]):
            forward(model, pool, [(sequence, piece)], ops=ops)
    assert seen.calls > 300
    assert not seen.faults


@pytest.mark.parametrize("picked", [1, 2, 4])
@pytest.mark.usefixtures("as_on_a_card")
def test_weights_of_any_number_of_experts_add_up(picked: int) -> None:
    weights = numbers((5, picked), 1, torch.float32)
    torch.testing.assert_close(moe._row_sums(weights), weights.sum(1, keepdim=True))


@pytest.mark.parametrize("reduce", [lambda x: x @ x, lambda x: x.sum(1), lambda x: x.softmax(0), lambda x: x.mean()])
def test_a_sum_between_kernels_is_seen(reduce: Any) -> None:
    with Between() as seen:
        reduce(torch.ones(4, 4))
    assert seen.faults


@pytest.mark.slow
@pytest.mark.usefixtures("as_on_a_card")
def test_the_probe_of_a_card_runs_every_step_of_a_token() -> None:
    model = small(sliding_window=3)
    for step in card_steps(model):
        x = numbers((9, *step.shape[1:]), 0, step.dtype)
        with torch.no_grad():
            whole, piece = step.run(x, 1), step.run(x[2:5], 1)
        assert whole.isfinite().all()
        torch.testing.assert_close(piece, whole[2:5], rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")
@pytest.mark.parametrize("number", range(12))
def test_every_step_on_a_card_gives_a_token_the_same_bits_however_its_prompt_is_cut(number: int) -> None:
    # Number 1 is the model with which fused rounding was found.
    seed = 323964681 if number < 2 else int(torch.randint(1 << 30, ()))
    subject = drawn_subject(seed, number, device="cuda", fp8_only=True)
    if not uses_triton("auto", subject.model.layout, "cuda"):
        pytest.skip("this model's records lie where the kernels cannot read them: it is not reproducible row by row")
    random = np.random.default_rng((seed, number))
    prompt = random.integers(0, subject.identity.vocab_size, 70).astype("<u4")
    whole = trace(subject.model, prompt, ())
    for cuts in ([33], sorted({*random.integers(1, 70, 5).tolist(), 66, 67, 68, 69}), list(range(1, 20))):
        assert not first_difference(whole, trace(subject.model, prompt, cuts)), (seed, number, cuts)
