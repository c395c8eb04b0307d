"""Steps of small operations use one thread, if no bits depend on the number of threads."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from antefix.model import Arithmetic, step_threads
from tests.model.random_models import bits, make


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def threads_of(num_tokens: int, *, are_free: bool) -> int:
    model = make("plain")
    model.threads_are_free = are_free
    with step_threads.step_threads(model, num_tokens):
        return torch.get_num_threads()


def test_few_tokens_take_one_thread_and_many_take_all():
    many = step_threads.SHARED_WORK // 32**2
    assert threads_of(1, are_free=True) == 1
    assert threads_of(many, are_free=True) == 2
    assert torch.get_num_threads() == 2


def test_where_bits_depend_on_threads_their_number_never_changes():
    assert threads_of(1, are_free=False) == 2


def test_threads_are_back_after_a_step_that_failed():
    model = make("plain")
    model.threads_are_free = True
    with pytest.raises(ValueError, match="broken"), step_threads.step_threads(model, 1):
        raise ValueError("broken")
    assert torch.get_num_threads() == 2


def test_bits_are_those_of_all_threads():
    model = make("plain")
    found = []
    for is_free in (False, True):
        model.threads_are_free = is_free
        found.append(bits(model, (21, 22), num_tokens=24))
    assert found[0] == found[1]


def test_the_probe_says_whether_threads_matter():
    plain = Arithmetic(name="cpu", setup="")
    assert plain.ignores_threads
    assert not Arithmetic(name="cpu", setup="", failed=("exp: depends on the number of threads",)).ignores_threads
