"""Block names that are reused from an earlier prompt equal the names that hashing gives."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from antefix.block import chain_of
from antefix.secret import Keyring
from antefix_router import naming
from antefix_router.naming import PromptNames

FINGERPRINT = b"f" * 32
KEYRING = Keyring(b"s" * 32)


@pytest.fixture
def names():
    return PromptNames(fingerprint=FINGERPRINT, keyring=KEYRING, block_size=4)


def hashes(tenant, tokens):
    return chain_of(tokens, fingerprint_digest=FINGERPRINT, key=KEYRING.key(tenant), block_size=4).hashes


@given(
    turns=st.lists(
        st.tuples(st.sampled_from(["a", "b"]), st.integers(0, 120), st.integers(0, 120), st.integers(0, 2)), max_size=12
    )
)
def test_every_prompt_gets_its_own_names_whatever_came_before(turns):
    names = PromptNames(fingerprint=FINGERPRINT, keyring=KEYRING, block_size=4)
    for tenant, common, rest, filler in turns:
        tokens = np.array([1] * common + [filler] * rest, np.uint32)
        assert names.prompt(tenant, tokens).chain.hashes == hashes(tenant, tokens)


def test_a_conversation_that_grows_is_hashed_where_it_is_new(names, monkeypatch):
    tokens = np.arange(1000, dtype=np.uint32)
    names.prompt("t", tokens[:900])
    hashed, expected = [], hashes("t", tokens)
    real = naming.Chain.extend
    monkeypatch.setattr(naming.Chain, "extend", lambda self, new: hashed.append(len(new)) or real(self, new))
    assert names.prompt("t", tokens).chain.hashes == expected
    assert hashed == [100]
    names.prompt("other tenant", tokens)
    assert hashed == [100, 1000]


def test_the_memory_of_prompts_is_bounded(names, monkeypatch):
    monkeypatch.setattr(naming, "_MEMO_TOKENS_MAX", 400)
    for number in range(30):
        names.prompt("t", np.full(100, number, np.uint32))
        assert names._memo._num_tokens <= 400
    assert len(names._memo._kept) == 4


def test_a_short_prompt_has_work_too(names):
    work = names.prompt("t", np.array([1, 2], np.uint32)).work(0)
    assert (work.num_tokens, work.stored_tokens) == (2, 0)


def test_affinity_is_where_the_unseen_part_begins(names):
    shared = np.arange(40, dtype=np.uint32)
    one = names.prompt("t", np.concatenate((shared, np.full(40, 7, np.uint32))))
    other = names.prompt("t", np.concatenate((shared, np.full(40, 8, np.uint32))))
    assert one.work(0).affinity == other.work(0).affinity
    assert one.work(10).affinity != other.work(10).affinity
    assert one.work(None).stored_tokens is None
