"""The store against a dict: puts, crashes and evictions in any order cause no wrong byte and no lost block."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from antefix.record import RecordKind
from antefix_kvstore.kvstore_config import KvStoreConfig
from antefix_kvstore.storage_engine import StorageEngine
from tests.kvstore.small_store import BLOCK, FINGERPRINT, Clock, Prompt

# Prompts that share prefixes of different lengths, so that chains fork.
# Records have both versions, also on shared prefixes.
PROMPTS = [
    Prompt([min(i, fork) if i >= fork else 0 for i in range(BLOCK * 6)], version=1 + fork % 2)
    for fork in (0, 9, 17, 30, 48)
]
MIB = 1 << 20


class StoreMachine(RuleBasedStateMachine):
    """`model` holds what must be there: names that were acknowledged and that nothing was allowed to take."""

    budget_bytes = 4 * MIB

    @initialize()
    def start(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="antefix-machine-"))
        self.clock = Clock()
        self.model: set[tuple[RecordKind, bytes]] = set()
        self.open()

    def open(self) -> None:
        config = KvStoreConfig(dir=str(self.directory / "store"), budget_bytes=self.budget_bytes)
        self.engine = StorageEngine(config, clock_ms=self.clock)

    def teardown(self) -> None:
        if hasattr(self, "engine"):
            if self.engine.is_open:
                self.engine.close()
            shutil.rmtree(self.directory)

    @rule(prompt=st.sampled_from(PROMPTS), count=st.integers(1, 6))
    def put(self, prompt: Prompt, count: int) -> None:
        result = self.engine.put(prompt.blocks(count))
        assert not result.refused
        names = {(RecordKind.BLOCK, h) for h in prompt.hashes[:count]}
        assert result.num_stored == len(names - self.model)
        self.model |= names

    @rule(prompt=st.sampled_from(PROMPTS), index=st.integers(0, 5))
    def put_checkpoint(self, prompt: Prompt, index: int) -> None:
        result = self.engine.put([prompt.checkpoint(index)])
        stored = (RecordKind.BLOCK, prompt.hashes[index]) in self.model
        assert bool(result.refused) != stored
        if stored:
            self.model.add((RecordKind.CHECKPOINT, prompt.hashes[index]))

    @rule(prompt=st.sampled_from(PROMPTS), index=st.integers(0, 5))
    def drop(self, prompt: Prompt, index: int) -> None:
        self.engine.evict([(RecordKind.BLOCK, prompt.hashes[index])])
        gone = {
            h
            for p in PROMPTS
            if prompt.hashes[index] in p.hashes
            for h in p.hashes[p.hashes.index(prompt.hashes[index]) :]
        }
        self.model = {name for name in self.model if name[1] not in gone}

    @rule(nbytes=st.integers(1, 3000))
    def evict(self, nbytes: int) -> None:
        self.clock.advance(1)
        self.engine.space.evict(nbytes)
        left = {name for name in self.model if self.engine.read(*name, fingerprint=FINGERPRINT) is not None}
        # Eviction is leaf-first, so all remaining records have all their ancestors.
        for prompt in PROMPTS:
            present = [(RecordKind.BLOCK, h) in left for h in prompt.hashes]
            assert present == sorted(present, reverse=True)
        self.model = left

    @rule()
    def compact(self) -> None:
        self.engine.space.compactor.compact_one(0.0)

    @rule()
    def reopen(self) -> None:
        self.engine.close()
        self.open()

    @rule()
    def crash_and_reopen(self) -> None:
        self.engine.abandon()
        self.open()

    @rule()
    def lose_the_index(self) -> None:
        """A rebuild may bring back what was evicted but lies in a segment still; it may lose nothing."""
        self.engine.abandon()
        shutil.rmtree(self.directory / "store" / "index")
        self.open()
        for prompt in PROMPTS:
            for block_hash in prompt.hashes:
                for kind in (RecordKind.BLOCK, RecordKind.CHECKPOINT):
                    if self.engine.read(kind, block_hash, fingerprint=FINGERPRINT) is not None:
                        self.model.add((kind, block_hash))

    @invariant()
    def agrees_with_the_model(self) -> None:
        if not hasattr(self, "engine"):
            return
        for prompt in PROMPTS:
            expected = 0
            while expected < 6 and (RecordKind.BLOCK, prompt.hashes[expected]) in self.model:
                expected += 1
            assert prompt.check(self.engine) == expected
            found = self.engine.lookup(prompt.hashes, fingerprint=FINGERPRINT)
            with_checkpoint = [i + 1 for i, h in enumerate(prompt.hashes) if (RecordKind.CHECKPOINT, h) in self.model]
            assert list(found.checkpoints) == [count for count in with_checkpoint if count <= expected]
        assert self.engine.counters.corrupt == 0
        assert self.engine.space.used_bytes <= self.budget_bytes


TestStoreMachine = StoreMachine.TestCase
TestStoreMachine.pytestmark = [pytest.mark.slow]
TestStoreMachine.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)
