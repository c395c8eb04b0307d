"""Sampling: greedy with the lowest index of equal logits, nucleus, and the same random numbers anywhere for a seed."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from antefix.errors import InvalidRequest
from antefix.sampling import Sampling
from antefix_decode.token_choice import Sampler

logits_of = st.lists(st.floats(-20, 20, width=32), min_size=2, max_size=40).map(lambda x: np.array(x, np.float32))


@given(logits=logits_of)
def test_greedy_takes_the_lowest_of_the_largest(logits):
    token = Sampler(Sampling(max_tokens=1)).choose(logits, 0)
    assert token == int(np.flatnonzero(logits == logits.max())[0])


@given(logits=logits_of, seed=st.integers(0, 2**64 - 1), position=st.integers(0, 2**31))
def test_a_seed_and_a_position_decide(logits, seed, position):
    sampling = Sampling(max_tokens=1, temperature=0.8, top_p=0.9, seed=seed)
    assert Sampler(sampling).choose(logits, position) == Sampler(sampling).choose(logits, position)


@given(logits=logits_of, top_p=st.floats(0.01, 1.0), seed=st.integers(0, 1000))
def test_nothing_outside_the_nucleus_is_drawn(logits, top_p, seed):
    token = Sampler(Sampling(max_tokens=1, temperature=1.0, top_p=top_p, seed=seed)).choose(logits, 3)
    probabilities = np.exp(logits.astype(np.float64) - logits.max())
    probabilities /= probabilities.sum()
    likelier = probabilities[probabilities > probabilities[token]].sum()
    assert likelier < top_p + 1e-9


def test_draws_follow_the_probabilities():
    logits = np.log(np.array([0.5, 0.3, 0.2], np.float32))
    sampler = Sampler(Sampling(max_tokens=1, temperature=1.0, seed=1))
    counts = np.bincount([sampler.choose(logits, position) for position in range(4000)], minlength=3) / 4000
    # Five standard deviations of a binomial share at n = 4000.
    assert np.allclose(counts, [0.5, 0.3, 0.2], atol=0.04)


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_tokens": 0},
        {"max_tokens": 1, "temperature": -1.0},
        {"max_tokens": 1, "temperature": float("nan")},
        {"max_tokens": 1, "top_p": 0.0},
        {"max_tokens": 1, "top_p": 1.5},
        {"max_tokens": 1, "stop": ((),)},
        {"max_tokens": 1, "stop": ((1,),) * 17},
    ],
)
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(InvalidRequest):
        Sampling(**wrong)
