"""A caller that is cancelled while its put waits or is committed harms no other put, and the writer continues."""

import threading

import pytest

from antefix_kvstore.group_commit import GroupCommitter
from tests.kvstore.small_store import BLOCK, FINGERPRINT, Prompt
from tests.waiting import AT_MOST_S


@pytest.mark.parametrize("when", ["waiting", "committing"])
def test_a_put_whose_caller_left_is_stored_and_others_are_served(open_engine, when, monkeypatch):
    engine = open_engine()
    prompts = [Prompt([number] * BLOCK * 3) for number in range(3)]
    begun, go_on = threading.Event(), threading.Event()
    put_group = engine.put_group

    def slow_put_group(puts):
        begun.set()
        assert go_on.wait(AT_MOST_S)
        return put_group(puts)

    monkeypatch.setattr(engine, "put_group", slow_put_group)
    writer = GroupCommitter(engine)
    try:
        first = writer.submit(prompts[0].blocks())
        assert begun.wait(AT_MOST_S)
        second = writer.submit(prompts[1].blocks())
        left = second if when == "waiting" else first
        assert left.cancel() is (when == "waiting")
        go_on.set()
        assert writer.submit(prompts[2].blocks()).result(AT_MOST_S).num_stored == 3
        assert [engine.lookup(p.hashes, fingerprint=FINGERPRINT).num_blocks for p in prompts] == [3, 3, 3]
    finally:
        go_on.set()
        writer.stop()
