"""Stopping: end tokens, stop sequences that are never shown, no text held back for ever, equal continued outputs."""

from hypothesis import given
from hypothesis import strategies as st

from antefix.sampling import Sampling
from antefix_decode.stopping import LENGTH, STOP, Stopper

EOS = frozenset({9})
outputs = st.lists(st.integers(0, 3), min_size=1, max_size=30)
stops = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=4).map(tuple), max_size=3).map(tuple)


def run(tokens, sampling, emitted=()):
    stopper, shown = Stopper(sampling, EOS, emitted), []
    for token in tokens:
        shown += stopper.push(token)
        if stopper.finish_reason:
            break
    return shown, stopper


def expected(tokens, stop, max_tokens):
    """The reference: scan the output for the first end."""
    for length in range(1, len(tokens) + 1):
        seen = tuple(tokens[:length])
        for sequence in stop:
            if seen[-len(sequence) :] == sequence:
                return list(seen[: -len(sequence)]), STOP
        if length >= max_tokens:
            return list(seen), LENGTH
    return None, ""


@given(tokens=outputs, stop=stops, max_tokens=st.integers(1, 20))
def test_what_is_shown_is_the_output_up_to_its_first_end(tokens, stop, max_tokens):
    shown, stopper = run(tokens, Sampling(max_tokens=max_tokens, stop=stop))
    whole, reason = expected(tokens, stop, max_tokens)
    assert stopper.finish_reason == reason
    if whole is not None:
        # No token of a longer stop sequence may be shown before it is complete, so the shown tokens must be a prefix.
        assert shown == whole[: len(shown)] and len(shown) == len(whole)


def test_the_end_token_ends_and_is_not_shown():
    shown, stopper = run([1, 9, 2], Sampling(max_tokens=10))
    assert (shown, stopper.finish_reason, stopper.num_output) == ([1], STOP, 2)


def test_ignoring_the_end_token_shows_it():
    shown, stopper = run([1, 9, 2], Sampling(max_tokens=3, ignore_eos=True))
    assert (shown, stopper.finish_reason) == ([1, 9, 2], LENGTH)


def test_a_continued_output_counts_and_matches_what_was_emitted():
    sampling = Sampling(max_tokens=4, stop=((1, 2),))
    assert run([2], sampling, emitted=[0, 1])[1].finish_reason == STOP
    shown, stopper = run([3, 3, 3], sampling, emitted=[0, 0])
    assert (shown, stopper.finish_reason) == ([3, 3], LENGTH)


def test_a_stop_token_ends_and_is_not_shown_also_where_the_end_token_is_ignored():
    sampling = Sampling(max_tokens=10, stop_token_ids=(2,), ignore_eos=True)
    shown, stopper = run([1, 9, 2], sampling)
    assert (shown, stopper.finish_reason, stopper.num_output) == ([1, 9], STOP, 3)


@given(tokens=outputs, stop=stops, min_tokens=st.integers(0, 20))
def test_no_stop_sequence_counts_that_is_complete_before_min_tokens(tokens, stop, min_tokens):
    shown, stopper = run(tokens, Sampling(max_tokens=30, stop=stop, min_tokens=min_tokens))
    ends = [
        length
        for length in range(min_tokens + 1, len(tokens) + 1)
        if any(tuple(tokens[:length][-len(sequence) :]) == sequence for sequence in stop)
    ]
    assert stopper.num_output == (ends[0] if ends else len(tokens))
    assert bool(stopper.finish_reason) is bool(ends) and shown == tokens[: len(shown)]


def test_what_a_grammar_ends_is_over_and_shown_whole():
    stopper = Stopper(Sampling(max_tokens=10, min_tokens=5), EOS)
    assert stopper.push(1) == [1] and stopper.push(2, is_last=True) == [2]
    assert stopper.finish_reason == STOP
