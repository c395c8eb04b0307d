"""The first requests after a start load no further modules: loading numpy.ma made one of them wait for 14 ms."""

import sys

import numpy as np
import pytest

from antefix.model import BlockPool
from antefix.sampling import Sampling
from antefix_decode.penalties import Penalties
from antefix_router.volatile_prefix import PrefixWatch
from tests.model.random_models import make


@pytest.fixture(autouse=True)
def as_after_a_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some of numpy's functions, such as unique and isin, load numpy.ma when they are called first."""
    monkeypatch.delattr(np, "ma", raising=False)
    monkeypatch.delitem(sys.modules, "numpy.ma", raising=False)


def test_a_function_that_loads_a_module_is_noticed() -> None:
    np.unique(np.arange(3))
    if "numpy.ma" not in sys.modules:
        pytest.skip("this version of numpy loads nothing here")


def test_comparing_a_client_s_prompts_loads_none() -> None:
    watch, random = PrefixWatch(), np.random.default_rng(1)
    text = random.integers(0, 9, 900).astype(np.uint32)
    for number in range(3):
        watch.note("client", np.concatenate((np.array([number], np.uint32), text)))
    assert "numpy.ma" not in sys.modules


def test_releasing_blocks_and_penalties_load_none() -> None:
    pool = BlockPool(make("plain").layout, 8)
    pool.release(pool.allocate(5))
    Penalties(Sampling(max_tokens=1, repetition_penalty=1.5), prompt=[3, 1, 3])
    assert "numpy.ma" not in sys.modules
