"""Work that runs between the layers of a chunk changes no bit of the chunk, and gets none of its own changed."""

import importlib.util

import numpy as np
import pytest
import torch

from antefix.model import BlockPool, Sequence, WindowState, forward
from antefix.model.compiled import check, switch
from antefix.model.ops import TorchOps
from antefix.model.pauses import layers_pause, with_pauses
from tests.model.random_models import make


class PlainOps(TorchOps):
    """Operations with which layers run one by one, as on a GPU."""


NUMBA = pytest.mark.skipif(importlib.util.find_spec("numba") is None, reason="Numba is not installed")
WAYS = [
    "one thread",
    "two threads",
    *(pytest.param(f"compiled, {n}", marks=NUMBA) for n in ("one thread", "two threads")),
]


@pytest.fixture
def on_threads(request, monkeypatch):
    """Returns a model that runs in this way on this process's threads."""
    before = torch.get_num_threads()
    monkeypatch.setattr(check, "_refused", False)

    def made(name):
        model, way = make(name), request.param
        model.threads_are_free = True
        torch.set_num_threads(2 if "two" in way else 1)
        assert "compiled" not in way or check.enable(model)
        return model

    yield made
    switch.use(False)
    torch.set_num_threads(before)


def new_sequence(model, pool, num_tokens):
    table = pool.allocate(-(-num_tokens // model.config.geometry.block_size))
    return Sequence(table, WindowState.zeros(model.layout, 0))


@pytest.mark.parametrize("name", ["plain", "odd everywhere"])
@pytest.mark.parametrize("in_pauses", [True, False])
def test_steps_between_a_chunks_layers_change_no_bit(name, in_pauses):
    check_steps_in_pauses(make(name), PlainOps(), in_pauses=in_pauses)


@pytest.mark.parametrize("on_threads", WAYS, indirect=True)
def test_steps_run_between_the_layers_of_a_chunk_on_a_cpu(on_threads):
    check_steps_in_pauses(on_threads("plain"), TorchOps(), in_pauses=True)


def check_steps_in_pauses(model, ops, *, in_pauses):
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, 300).astype(np.uint32)
    pool = BlockPool(model.layout, 64)
    chunk, stepping = new_sequence(model, pool, 300), new_sequence(model, pool, 300)
    forward(model, pool, [(stepping, tokens[:40])], ops=ops)
    steps = []

    def step():
        assert not torch.is_inference_mode_enabled()
        steps.append(forward(model, pool, [(stepping, tokens[40 + len(steps) : 41 + len(steps)])], ops=ops))
        return True

    with with_pauses(step if in_pauses else None):
        logits = forward(model, pool, [(chunk, tokens)], ops=ops)
    assert len(steps) == in_pauses * len(model.model.layers)
    while len(steps) < len(model.model.layers):
        step()
    # The same calls one after another, in another pool.
    other = BlockPool(model.layout, 64)
    alone, after = new_sequence(model, other, 300), new_sequence(model, other, 300)
    assert torch.equal(logits, forward(model, other, [(alone, tokens)], ops=ops))
    forward(model, other, [(after, tokens[:40])], ops=ops)
    for number, step_logits in enumerate(steps):
        want = forward(model, other, [(after, tokens[40 + number : 41 + number])], ops=ops)
        assert torch.equal(step_logits, want)
    assert chunk.window.to_bytes() == alone.window.to_bytes()
    assert stepping.window.to_bytes() == after.window.to_bytes()
    for mine, theirs in ((chunk, alone), (stepping, after)):
        assert torch.equal(pool.rows[mine.block_table], other.rows[theirs.block_table])


def test_without_pauses_nothing_is_called():
    assert layers_pause(torch.device("cpu")) is None
    with with_pauses(lambda: False):
        assert layers_pause(torch.device("cpu")) is not None
        with with_pauses(None):
            assert layers_pause(torch.device("cpu")) is None
    assert layers_pause(torch.device("cpu")) is None
