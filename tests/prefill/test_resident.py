"""The pool's accounting: no block is lost, shared wrongly, or evicted while in use."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from antefix.errors import Overloaded
from antefix_prefill.worker.resident_blocks import ResidentBlocks

NUM_BLOCKS = 6


class FakePool:
    num_blocks = NUM_BLOCKS

    def __init__(self):
        self.free = set(range(NUM_BLOCKS))

    @property
    def num_free(self):
        return len(self.free)

    def allocate(self, num_blocks, after=None):
        return [self.free.pop() for _ in range(num_blocks)]

    def release(self, block_ids):
        assert not self.free & set(block_ids), "released twice"
        self.free |= set(block_ids)


def name(index):
    return bytes([index]) * 32


class Books(RuleBasedStateMachine):
    held = Bundle("held")

    def __init__(self):
        super().__init__()
        self.pool = FakePool()
        self.blocks = ResidentBlocks(self.pool)
        self.uses = []
        self.content = {}

    @rule(target=held, num_blocks=st.integers(0, NUM_BLOCKS))
    def allocate(self, num_blocks):
        available = self.blocks.num_available
        try:
            block_ids = self.blocks.allocate(num_blocks)
        except Overloaded:
            assert num_blocks > available
            return []
        in_use = {block for use in self.uses for block in use}
        assert not in_use & set(block_ids), "a block in use was given away"
        for block in block_ids:
            self.content.pop(block, None)
        self.uses.append(block_ids)
        return block_ids

    @rule(target=held, length=st.integers(0, 4))
    def take(self, length):
        block_ids = self.blocks.take([name(i) for i in range(length)])
        assert [self.content[block] for block in block_ids] == list(range(len(block_ids)))
        self.uses.append(block_ids)
        return block_ids

    @rule(block_ids=held)
    def publish(self, block_ids):
        if block_ids not in self.uses:
            return
        for index, block in enumerate(block_ids):
            if block not in self.content:
                self.blocks.publish(name(index), block)
                named = self.blocks.take([name(index)])
                if named == [block]:
                    self.content[block] = index
                self.blocks.release(named)

    @rule(block_ids=held)
    def publish_all(self, block_ids):
        if block_ids not in self.uses or any(block in self.content for block in block_ids):
            return
        self.blocks.publish_all([name(index) for index in range(len(block_ids))], block_ids)
        for index, block in enumerate(block_ids):
            named = self.blocks.take([name(index)])
            if named == [block]:
                self.content[block] = index
            self.blocks.release(named)

    @rule(block_ids=consumes(held))
    def release(self, block_ids):
        if block_ids in self.uses:
            self.uses.remove(block_ids)
            self.blocks.release(block_ids)

    @invariant()
    def every_block_is_somewhere(self):
        in_use = {block for use in self.uses for block in use}
        assert len(in_use) + self.blocks.num_available == NUM_BLOCKS
        assert not in_use & self.pool.free


Books.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestBooks = Books.TestCase


def test_the_end_of_a_prefix_is_evicted_before_its_beginning():
    blocks = ResidentBlocks(FakePool())
    ids = blocks.allocate(4)
    for index, block in enumerate(ids):
        blocks.publish(name(index), block)
    blocks.release(ids)
    blocks.allocate(4)
    assert blocks.num_leading([name(i) for i in range(4)]) == 2


def test_too_much_at_once_takes_nothing():
    blocks = ResidentBlocks(FakePool())
    blocks.allocate(4)
    with pytest.raises(Overloaded):
        blocks.allocate(3)
    assert len(blocks.allocate(2)) == 2


def test_routers_hear_of_blocks_that_are_published_together():
    told, names = [], [name(index) for index in range(4)]
    for together in (False, True):
        blocks = ResidentBlocks(FakePool())
        ids = blocks.allocate(4)
        before = blocks.events.cursor
        blocks.publish(names[3], ids[3])
        if together:
            blocks.publish_all(names[:3], ids[:3])
        else:
            for each, block in zip(names[:3], ids[:3], strict=True):
                blocks.publish(each, block)
        assert blocks.take(names) == ids
        told.append(b"".join(event.hashes for event in blocks.events.since(before).events))
    assert told[0] == told[1] and len(told[0]) > 0
