"""Prefills whose rows several threads share give the exact bits of one thread, and errors reach the caller."""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from antefix.errors import InternalError
from antefix.model import BlockPool, Model, Sequence, WindowState, forward, row_threads
from antefix.model.compiled import check, switch
from antefix.model.parted_layers import PartedLayers
from antefix.model.row_threads import Meeting, parts_of, run_each
from tests.model.random_models import make

LENGTHS = (90, 33, 40)


@pytest.fixture(autouse=True)
def threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(row_threads, "PART_ROWS_MIN", 16)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def left_behind(model: Model, num_threads: int) -> list[bytes]:
    """Run three sequences in two calls. Returns all logits, states and the pool."""
    torch.set_num_threads(num_threads)
    model.threads_are_free = True
    random = np.random.default_rng(3)
    size = model.config.geometry.block_size
    needed = [-(-2 * length // size) for length in LENGTHS]
    pool = BlockPool(model.layout, sum(needed))
    sequences = [Sequence(pool.allocate(count), WindowState.zeros(model.layout, 0)) for count in needed]
    left = []
    for logits in ("last", "all"):
        batch = [
            (sequence, random.integers(0, model.config.vocab_size, length).astype("<u4"))
            for sequence, length in zip(sequences, LENGTHS, strict=True)
        ]
        left.append(forward(model, pool, batch, logits=logits).numpy().tobytes())  # type: ignore[arg-type]
    return [*left, *(sequence.window.to_bytes() for sequence in sequences), pool.rows.numpy().tobytes()]


@pytest.mark.parametrize("name", ["plain", pytest.param("odd everywhere", marks=pytest.mark.slow)])
def test_rows_of_several_threads_have_the_bits_of_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(name)
    expected = left_behind(model, 1)
    ran = []
    monkeypatch.setattr("antefix.model.parted_layers.run_each", lambda works: ran.append(len(works)) or run_each(works))
    assert left_behind(model, 2) == left_behind(model, 3) == expected
    assert ran == [2, 2, 3, 3]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("numba") is None, reason="Numba is not installed")
def test_compiled_layers_on_several_threads_have_the_bits_of_torch_on_one(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("plain")
    expected = left_behind(model, 1)
    monkeypatch.setattr(check, "_refused", False)
    found, compiled = [], PartedLayers._compiled

    def seen(self: PartedLayers, tokens: torch.Tensor, positions: torch.Tensor) -> object:
        found.append(compiled(self, tokens, positions))
        return found[-1]

    monkeypatch.setattr(PartedLayers, "_compiled", seen)
    try:
        assert check.enable(model)
        assert left_behind(model, 2) == left_behind(model, 3) == expected
    finally:
        switch.use(False)
    assert len(found) == 2 * (2 + 3) and None not in found


def test_parts_are_whole_tiles_that_cover_all_rows() -> None:
    model = make("plain")
    assert parts_of(model, 160, 2) == [slice(0, 160)]  # It was not measured that bits do not depend on threads.
    model.threads_are_free = True
    assert parts_of(model, 160, 3) == [slice(0, 48), slice(48, 96), slice(96, 160)]
    assert parts_of(model, 16, 3) == [slice(0, 16)]
    assert parts_of(model, 8, 3) == [slice(0, 8)]


def test_a_thread_that_fails_ends_the_call_and_another_one_works(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("plain")
    expected = left_behind(model, 1)
    norm = model.model.layers[1].post_attention_layernorm  # type: ignore[union-attr]
    main = threading.get_ident()

    def fail_elsewhere(x: torch.Tensor) -> torch.Tensor:
        if threading.get_ident() != main:
            raise InternalError("broken")
        return type(norm).forward(norm, x)  # type: ignore[operator, no-any-return]

    with monkeypatch.context() as broken:
        broken.setattr(norm, "forward", fail_elsewhere)
        with pytest.raises(InternalError, match="broken"):
            left_behind(model, 2)
        assert torch.get_num_threads() == 2
    assert left_behind(model, 2) == expected


def test_a_call_next_to_another_one_takes_no_threads() -> None:
    def inside(meeting: Meeting) -> object:
        return run_each([lambda _: 1, lambda _: 2])

    assert run_each([inside, lambda _: "other"]) == [None, "other"]
