"""Recording a step as a CUDA graph: a recording that fails changes nothing that runs after it."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from antefix.model.step_runner import StepRunner


class Card:
    """Stands in for torch's streams and graphs. Like torch's, its `graph` leaves its own stream current and its memory
    open if the recording has failed.
    """

    device, is_open = torch.device("cuda", 0), False

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.current: Any = self.stream("the worker's")
        for name in ("current_stream", "set_stream", "graph", "graph_pool_handle", "CUDAGraph"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        # PyTorch without CUDA may have no such function.
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", self.close_memory, raising=False)

    @staticmethod
    def stream(name: str) -> Any:
        class Stream:
            device_index = 0

            def __repr__(self) -> str:
                return name

        return Stream()

    def current_stream(self, device: Any = None) -> Any:
        return self.current

    def set_stream(self, stream: Any) -> None:
        self.current = stream

    def graph_pool_handle(self) -> tuple[int, int]:
        return 0, 1

    def close_memory(self, device: int, memory: tuple[int, int]) -> None:
        if not self.is_open:
            raise RuntimeError("not currently recording")
        self.is_open = False

    class CUDAGraph:
        def replay(self) -> None: ...

    @contextlib.contextmanager
    def graph(self, graph: Any, *, pool: Any, capture_error_mode: str) -> Iterator[None]:
        was, self.current, self.is_open = self.current, self.stream("the recording's"), True
        yield
        self.current, self.is_open = was, False


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Card:
    return Card(monkeypatch)


def record(card: Card, step: Any) -> Any:
    model: Any = card
    return StepRunner(reproducible=False, graphs=True)._captured(model, step, is_warm=True)


def test_after_a_failed_recording_the_thread_is_back_on_its_stream(card: Card) -> None:
    before = card.current

    def step() -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match="not permitted"):
        record(card, step)
    assert card.current is before
    assert not card.is_open
    assert gc.isenabled()


def test_garbage_is_collected_again_even_if_the_gpu_is_lost(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(stream: Any) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "set_stream", fail)
    try:
        with pytest.raises(RuntimeError, match="illegal memory access"):
            record(card, lambda: None)
        assert gc.isenabled()
    finally:
        gc.enable()


def test_a_torch_that_closes_no_memory_hides_no_error(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch._C, "_cuda_endAllocateToPool")

    def step() -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match="not permitted"):
        record(card, step)


def test_no_garbage_is_collected_while_a_step_is_recorded(card: Card) -> None:
    """A graph that is destroyed during a recording ends the recording."""
    before = card.current
    assert record(card, lambda: (gc.isenabled(), card.current is before))[1] == (False, False)
    assert gc.isenabled()
    assert card.current is before
