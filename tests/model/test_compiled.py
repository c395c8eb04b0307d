"""A CPU's compiled kernels give the exact bits of torch's operations, or none of them is used."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import cast

import numpy as np
import pytest
import torch

from antefix.layout import KVFormat
from antefix.model import BlockPool, Model, Sequence, WindowState, forward
from antefix.model.attention import CSACompressor
from antefix.model.compiled import check, switch
from antefix.model.compiled.sources import sources_digest
from antefix.model.model import DecoderLayer
from antefix.model.numerics import linear
from antefix.model.ops import TorchOps
from tests.model.random_models import AWKWARD, make

# Compiling takes about ten seconds of processor time if no earlier run left compiled code.
needs_numba = pytest.mark.skipif(importlib.util.find_spec("numba") is None, reason="Numba is not installed")


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(check, "_refused", False)
    yield
    switch.use(False)


def left_behind(model: Model) -> list[bytes]:
    """Run prompts in pieces of many sizes, then mixed steps. Returns all logits, window states and the pool."""
    random = np.random.default_rng(2)
    size = model.config.geometry.block_size
    pool = BlockPool(model.layout, 4 * (400 // size + 1))
    sequences = [Sequence(pool.allocate(400 // size + 1), WindowState.zeros(model.layout, 0)) for _ in range(4)]

    def draw(count: int) -> np.ndarray:
        return random.integers(0, model.config.vocab_size, count).astype("<u4")

    left = []
    for sequence, pieces in zip(sequences, ((1, 5), (40, 9, 30), (150, 1, 3), (8, 90)), strict=True):
        left += [forward(model, pool, [(sequence, draw(count))], ops=TorchOps()) for count in pieces]
    for number in range(24):
        # In some steps one sequence takes no part, and in some it runs three tokens.
        batch = [
            (sequence, draw(3 if (number + i) % 7 == 0 else 1))
            for i, sequence in enumerate(sequences)
            if (number + i) % 4
        ]
        left.append(forward(model, pool, batch, logits="all", ops=TorchOps()))
    states = [sequence.window.to_bytes() for sequence in sequences]
    return [*(logits.numpy().tobytes() for logits in left), *states, pool.rows.numpy().tobytes()]


@needs_numba
@pytest.mark.slow
@pytest.mark.parametrize("kv_format", [KVFormat.FP8, KVFormat.FLOAT32])
@pytest.mark.parametrize("name", AWKWARD)
def test_steps_and_pieces_leave_the_bits_that_torch_leaves(name: str, kv_format: KVFormat) -> None:
    model = make(name, kv_format=kv_format)
    expected = left_behind(model)
    assert check.enable(model) and switch.is_on()
    from antefix.model.compiled.layers import plans_of

    # Steps take three calls per layer, except for the model that scores experts in another way.
    assert (plans_of(model) is None) == (name == "three heads")
    assert left_behind(model) == expected


@needs_numba
@pytest.mark.slow
def test_entries_of_any_size_are_stored_as_torch_stores_them() -> None:
    """Also entries that are not finite, which the kernel leaves to torch."""
    model = make("plain")
    # False where torch has no MKL: there the kernel would call a function at address 0.
    assert check.enable(model)
    for layer in {cast(DecoderLayer, layer).self_attn.kind: layer for layer in model.model.layers}.values():
        attention = cast(DecoderLayer, layer).self_attn
        if (compressor := attention.compressor) is None:
            continue
        norms = [compressor.kv_norm]
        norms += [compressor.indexer.kv_norm] if isinstance(compressor, CSACompressor) else []
        for factor in (0.0, -1e-42, 1e-12, 1e30, float("inf"), float("nan")):
            for norm in norms:
                norm.weight.data[: model.config.geometry.indexer_dim // 2] = factor
            left = []
            for on in (False, True):
                switch.use(on)
                with torch.inference_mode():
                    angles = model.rope(attention.kind, torch.arange(11) * 37)
                    left.append([x.view(torch.uint8) for _, x in check._closed_groups(model, attention, angles)])
            assert all(map(torch.equal, *left)), (attention.kind, factor)


@needs_numba
@pytest.mark.slow
def test_weights_that_changed_are_seen_by_the_next_step() -> None:
    model = make("plain")
    assert check.enable(model)
    left_behind(model)
    first, _, last = (cast(DecoderLayer, layer) for layer in model.model.layers)
    first.self_attn.q_b_proj.weight.data.mul_(1.5)
    last.mlp.gate.weight = torch.nn.Parameter(last.mlp.gate.weight.detach().flip(0), requires_grad=False)
    compiled = left_behind(model)
    switch.use(False)
    assert left_behind(model) == compiled


@needs_numba
@pytest.mark.slow
def test_two_threads_that_step_at_once_leave_what_one_leaves() -> None:
    """Kernels run without Python's lock, so no memory that they read may be freed before they end."""
    model = make("plain")
    assert check.enable(model)
    expected = left_behind(model)
    with ThreadPoolExecutor(2) as threads:
        runs = [threads.submit(left_behind, model) for _ in range(6)]
    assert all(run.result() == expected for run in runs)


@needs_numba
@pytest.mark.slow
def test_plans_are_never_older_than_the_weights_that_they_are_said_to_be_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads that share a prefill's rows look for the plans at the same time."""
    from antefix.model.compiled import layers

    seen = []

    class Spied(layers._Kept):
        def __setattr__(self, name: str, value: object) -> None:
            super().__setattr__(name, value)
            if name == "made_of" and value:
                seen.append(self.plans)

    monkeypatch.setattr(layers, "_Kept", Spied)
    assert layers.plans_of(make("plain")) is seen[0] is not None


@needs_numba
@pytest.mark.slow
def test_compiled_code_is_kept_under_the_name_of_its_sources() -> None:
    from antefix.model.compiled.attention_kernels import attend_line

    assert attend_line.py_func.__qualname__ == f"attend_line_{sources_digest()}"  # type: ignore[attr-defined]


def test_a_change_of_any_source_of_the_kernels_is_noticed(tmp_path: Path) -> None:
    found = []
    for kernel, part in (("run()", "a"), ("run()", "b"), ("run()b", ""), ("run()", "a")):
        (tmp_path / "kernel.py").write_text(f"from llvmlite import ir\n{kernel}")
        (tmp_path / "part.py").write_text(f"from antefix.model.compiled.intrinsics import plain\n{part}")
        (tmp_path / "caller.py").write_text(f"calls only: {len(found)}")
        found.append(sources_digest.__wrapped__(tmp_path))
    assert found[0] == found[3] and len(set(found)) == 3
    assert len(sources_digest()) == 16


def test_another_result_in_one_layer_switches_all_of_them_off(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("plain")

    def compare(model: Model, on: bool, num_rows: int = 5) -> Iterator[tuple[str, torch.Tensor]]:
        del model
        yield "queries", torch.ones(num_rows, 4)
        # The compiled kernels' numbers are the next larger float.
        yield "experts", torch.full((num_rows, 4), 1.0 + on * 2.0**-23)

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: ModuleType(name))
    monkeypatch.setattr(check, "_compare", compare)
    monkeypatch.setattr(check, "_compare_together", lambda *_: iter(()))
    assert not check.enable(model) and not switch.is_on()
    # The kernels stay off, because a process' results must not depend on models that it loads later.
    monkeypatch.setattr(check, "_compare", lambda model, on, num_rows=5: iter([("x", torch.ones(num_rows))]))
    assert not check.enable(model)


def test_without_numba_torch_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert not check.enable(make("plain")) and not switch.is_on()


def test_a_model_that_is_no_float32_on_a_cpu_is_left_alone() -> None:
    assert not check.enable(make("plain").to(torch.bfloat16)) and not switch.is_on()


def test_with_gradients_torch_computes() -> None:
    switch.use(True)
    x = torch.ones(3, 16, requires_grad=True)
    linear(x, torch.ones(16, 16)).sum().backward()
    assert x.grad is not None and torch.equal(x.grad, torch.full((3, 16), 16.0))
