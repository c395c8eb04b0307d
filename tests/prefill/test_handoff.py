"""A handoff's bytes come back unchanged, and all other bytes are refused."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from antefix.errors import BlockCorrupt
from antefix_decode.adopt import take_handoff
from antefix_prefill.handoff import Handoff
from antefix_prefill.leave_handoff import leave_handoff
from antefix_prefill.run_prompt import run_prompt


def made(position=5, window=b"window", row=b"row", vocab=7, prompt=b"p" * 32):
    logits = np.arange(vocab, dtype=np.float32)
    return Handoff(position=position, prompt=prompt, window=window, partial_row=row, logits=logits)


@given(
    position=st.integers(0, 2**40), window=st.binary(max_size=64), row=st.binary(max_size=64), vocab=st.integers(0, 9)
)
def test_bytes_come_back(position, window, row, vocab):
    sent = made(position, window, row, vocab)
    got = Handoff.from_bytes(sent.to_bytes())
    assert (got.position, got.prompt, got.window, got.partial_row) == (position, b"p" * 32, window, row)
    assert np.array_equal(got.logits, sent.logits)


@given(cut=st.integers(0, 80))
def test_a_cut_one_is_refused(cut):
    data = made().to_bytes()
    with pytest.raises(BlockCorrupt):
        Handoff.from_bytes(data[: min(cut, len(data) - 1)])


def test_another_magic_is_refused():
    with pytest.raises(BlockCorrupt):
        Handoff.from_bytes(b"XXXX" + made().to_bytes()[4:])


async def test_a_handoff_is_taken_for_its_own_prompt_alone(make_engine, make_prompt):
    engine = make_engine()
    tokens = np.arange(150) % 250
    prompt = make_prompt(engine, tokens)
    name = await leave_handoff(engine, await run_prompt(engine, prompt))
    assert (await take_handoff(engine, prompt, name)).position == 150
    # A prompt of equal length with another token, in a block or in the rest after the last block, or of another tenant.
    for place in (3, 149):
        other = tokens.copy()
        other[place] += 1
        assert await take_handoff(engine, make_prompt(engine, other), name) is None
    assert await take_handoff(engine, make_prompt(engine, tokens, tenant="other"), name) is None
