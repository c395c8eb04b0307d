"""Log probabilities equal the softmax, come in falling order, and are never shown before their token."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from antefix.wire import TokenLogprob, logprobs_from_wire, logprobs_to_wire
from antefix_decode.logprobs import Logprobs, token_logprob

logits_of = st.lists(st.floats(-30, 30, width=32), min_size=2, max_size=50).map(lambda x: np.array(x, np.float32))


@given(logits=logits_of, num_top=st.integers(0, 20), data=st.data())
def test_they_are_those_of_the_softmax_and_the_likeliest_come_first(logits, num_top, data):
    token = data.draw(st.integers(0, len(logits) - 1))
    expected = torch.log_softmax(torch.tensor(logits, dtype=torch.float64), 0).numpy()
    found = token_logprob(logits, token, num_top)
    assert np.isclose(found.logprob, expected[token], rtol=1e-6, atol=1e-6)
    by_hand = sorted(range(len(logits)), key=lambda index: (-logits[index], index))[:num_top]
    assert [index for index, _ in found.top] == by_hand
    assert np.allclose([value for _, value in found.top], expected[by_hand], rtol=1e-6, atol=1e-6)


def test_what_is_held_back_keeps_its_log_probability_until_it_is_shown():
    logits = np.log(np.array([0.5, 0.25, 0.25], np.float32))
    logprobs = Logprobs(1)
    for token in (0, 1):
        logprobs.push(logits, token)
    (first,) = logprobs.take(1)
    (second,) = logprobs.take(1)
    assert np.isclose(np.exp([first.logprob, second.logprob]), [0.5, 0.25]).all()
    assert first.top == second.top and first.top[0][0] == 0


def test_nothing_is_computed_where_nobody_asks():
    logprobs = Logprobs()
    logprobs.push(np.zeros(3, np.float32), 0)
    assert logprobs.take(1) == ()


@given(
    values=st.integers(0, 3).flatmap(
        lambda num_top: st.lists(
            st.builds(
                lambda logprob, top: TokenLogprob(logprob=logprob, top=tuple(top)),
                st.floats(-100, 0, width=32),
                st.lists(
                    st.tuples(st.integers(0, 2**32 - 1), st.floats(-100, 0, width=32)),
                    min_size=num_top,
                    max_size=num_top,
                ),
            ),
            min_size=1,
            max_size=5,
        )
    )
)
def test_they_come_through_the_wire_as_they_are(values):
    message = logprobs_to_wire(values)
    assert message is not None and logprobs_from_wire(message) == tuple(values)
