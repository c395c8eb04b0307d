"""A handoff's bytes come back as they went in, and anything else is refused."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from antefix.errors import BlockCorrupt
from antefix.worker.handoff import Handoff


def made(position=5, window=b"window", row=b"row", vocab=7):
    logits = np.arange(vocab, dtype=np.float32)
    return Handoff(position=position, window=window, partial_row=row, logits=logits)


@given(
    position=st.integers(0, 2**40), window=st.binary(max_size=64), row=st.binary(max_size=64), vocab=st.integers(0, 9)
)
def test_bytes_come_back(position, window, row, vocab):
    sent = made(position, window, row, vocab)
    got = Handoff.from_bytes(sent.to_bytes())
    assert (got.position, got.window, got.partial_row) == (position, window, row)
    assert np.array_equal(got.logits, sent.logits)


@given(cut=st.integers(0, 80))
def test_a_cut_one_is_refused(cut):
    data = made().to_bytes()
    with pytest.raises(BlockCorrupt):
        Handoff.from_bytes(data[: min(cut, len(data) - 1)])


def test_another_magic_is_refused():
    with pytest.raises(BlockCorrupt):
        Handoff.from_bytes(b"XXXX" + made().to_bytes()[4:])
