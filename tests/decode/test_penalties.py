"""Each setting agrees with a plain implementation here, written from vLLM's documentation."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from antefix.errors import InvalidRequest
from antefix.sampling import Sampling
from antefix.wire import sampling_from_wire, sampling_to_wire
from antefix_decode.penalties import Penalties
from antefix_decode.token_choice import Sampler

VOCAB = 12
EOS = {10}
tokens = st.lists(st.integers(0, VOCAB - 1), max_size=12)
logits_of = st.lists(st.floats(-8, 8, width=32), min_size=VOCAB, max_size=VOCAB).map(lambda x: np.array(x, np.float32))
settings = st.fixed_dictionaries(
    {
        "top_k": st.integers(0, VOCAB + 2),
        "min_p": st.sampled_from([0.0, 0.05, 0.3, 1.0]),
        "top_p": st.sampled_from([0.2, 0.7, 0.95, 1.0]),
        "temperature": st.sampled_from([0.0, 0.5, 1.0, 1.7]),
        "presence_penalty": st.sampled_from([0.0, -2.0, 0.7, 2.0]),
        "frequency_penalty": st.sampled_from([0.0, -1.0, 0.4, 2.0]),
        "repetition_penalty": st.sampled_from([1.0, 0.5, 1.3, 3.0]),
        "logit_bias": st.sampled_from([(), ((3, 5.0),), ((0, -100.0), (11, 2.5))]),
        "min_tokens": st.integers(0, 8),
        "stop_token_ids": st.sampled_from([(), (4,), (4, 11)]),
    }
)


def processed(logits, sampling, prompt, output):
    """The reference, token by token: min_tokens, bias, repetition, frequency, presence. Uses no code under test."""
    found = []
    for token, value in enumerate(float(x) for x in logits):
        if len(output) < sampling.min_tokens and token in EOS | set(sampling.stop_token_ids):
            value = -math.inf
        value += dict(sampling.logit_bias).get(token, 0.0)
        if token in prompt or token in output:
            value = value / sampling.repetition_penalty if value > 0 else value * sampling.repetition_penalty
        value -= sampling.frequency_penalty * output.count(token)
        value -= sampling.presence_penalty * (token in output)
        found.append(value)
    return found


def distribution(values, sampling):
    """Probabilities after temperature, min_p, top_k and top_p, as in vLLM's native sampler."""
    scaled = [value / sampling.temperature for value in values]
    weights = [math.exp(value - max(scaled)) for value in scaled]
    weights = [weight if weight >= sampling.min_p * max(weights) else 0.0 for weight in weights]
    if 0 < sampling.top_k < len(weights):
        least = sorted(weights)[-sampling.top_k]
        weights = [weight if weight >= least else 0.0 for weight in weights]
    total = sum(weights)
    # From the least likely token up, drop tokens while their sum is at most 1 - top_p. The likeliest token always
    # stays.
    order = sorted(range(len(weights)), key=lambda token: (weights[token], -token))
    below = 0.0
    for token in order[:-1]:
        below += weights[token] / total
        if below <= 1 - sampling.top_p:
            weights[token] = 0.0
    return [weight / sum(weights) for weight in weights]


@given(logits=logits_of, prompt=tokens, output=tokens, values=settings)
def test_logits_are_what_vllm_makes_of_them(logits, prompt, output, values):
    sampling = Sampling(max_tokens=20, **values)
    before = logits.copy()
    made = Penalties(sampling, stop_ids=EOS, prompt=prompt, emitted=output).apply(logits)
    assert np.allclose(made, processed(before, sampling, prompt, output), rtol=1e-5, atol=1e-4)
    assert np.array_equal(logits, before)


@pytest.mark.slow
@given(logits=logits_of, prompt=tokens, output=tokens, values=settings)
def test_tokens_are_drawn_as_often_as_vllm_draws_them(logits, prompt, output, values):
    """The whole unit interval of draws, in steps: each token gets the share that is its probability."""
    sampling = Sampling(max_tokens=20, seed=0, **values)
    penalties = Penalties(sampling, stop_ids=EOS, prompt=prompt, emitted=output)
    sampler = Sampler(sampling, penalties)
    made = penalties.apply(logits)
    value = [float(each) for each in made]
    if sampling.temperature == 0.0:
        assert sampler.choose(logits, 0) == value.index(max(value))
        return
    num_draws = 400
    drawn = np.zeros(VOCAB)
    for number in range(num_draws):
        sampler._uniform = lambda position, number=number: (number + 0.5) / num_draws
        drawn[sampler._draw(made, 0)] += 1 / num_draws
    expected = np.array(distribution(value, sampling))
    assert _is_on_an_edge(value, sampling) or np.allclose(drawn, expected, atol=1.5 / num_draws), (drawn, expected)


def _is_on_an_edge(values, sampling):
    """Whether a tiny change of a limit keeps other tokens. Then rounding decides which tokens are kept."""
    kept = set()
    for factor in (1 - 1e-9, 1.0, 1 + 1e-9):
        limits = replace(sampling, top_p=min(1.0, sampling.top_p * factor), min_p=min(1.0, sampling.min_p * factor))
        kept.add(tuple(share > 0 for share in distribution(values, limits)))
    return len(kept) > 1


@given(prompt=tokens, output=tokens, logits=logits_of)
def test_only_repetition_counts_the_prompt(prompt, output, logits):
    sampling = Sampling(max_tokens=20, presence_penalty=2.0, frequency_penalty=1.0)
    with_prompt = Penalties(sampling, prompt=prompt, emitted=output).apply(logits)
    assert np.array_equal(with_prompt, Penalties(sampling, emitted=output).apply(logits))


@pytest.mark.slow
@given(logits=st.lists(logits_of, min_size=6, max_size=6), prompt=tokens, cut=st.integers(0, 6), values=settings)
def test_an_output_that_is_continued_elsewhere_goes_on_as_it_would_have(logits, prompt, cut, values):
    sampling = Sampling(max_tokens=20, seed=9, **values)

    def go_on(output):
        sampler = Sampler(sampling, Penalties(sampling, stop_ids=EOS, prompt=prompt, emitted=output))
        return [
            *output,
            *(sampler.choose(row, position) for position, row in enumerate(logits) if position >= len(output)),
        ]

    whole = go_on([])
    assert go_on(whole[:cut]) == whole


def test_an_end_that_is_all_that_is_left_may_come_before_min_tokens():
    only_end = np.full(VOCAB, -np.inf, np.float32)
    only_end[10] = 1.0
    assert (
        Sampler(
            Sampling(max_tokens=5, min_tokens=3), Penalties(Sampling(max_tokens=5, min_tokens=3), stop_ids=EOS)
        ).choose(only_end, 0)
        == 10
    )


@given(values=settings)
def test_settings_come_through_the_wire_as_they_are(values):
    sampling = Sampling(max_tokens=20, grammar='start: "a"', ignore_eos=True, seed=1, **values)
    back = sampling_from_wire(sampling_to_wire(sampling))
    for name in Sampling.__slots__:
        assert (
            np.allclose(getattr(back, name), getattr(sampling, name))
            if name not in ("grammar", "stop", "logit_bias", "num_top_logprobs")
            else getattr(back, name) == getattr(sampling, name)
        )


@pytest.mark.parametrize(
    "wrong",
    [
        {"top_k": -1},
        {"min_p": 1.5},
        {"min_p": math.nan},
        {"presence_penalty": 2.5},
        {"frequency_penalty": -3.0},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": math.inf},
        {"min_tokens": 2},
        {"min_tokens": -1},
        {"logit_bias": ((1, 101.0),)},
        {"logit_bias": ((1, math.nan),)},
        {"logit_bias": tuple((token, 1.0) for token in range(1025))},
        {"stop_token_ids": (-1,)},
        {"grammar": "x" * (1 << 20)},
    ],
)
def test_settings_out_of_range_are_refused_by_name(wrong):
    with pytest.raises(InvalidRequest) as caught:
        Sampling(max_tokens=1, **wrong)
    assert caught.value.param == next(iter(wrong))
