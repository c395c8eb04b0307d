"""A ledger against a dict over random operations: appends, repeats, rotation, crashes with a torn end, lost indexes."""

import random
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from antefix_billing.ledger import Ledger
from antefix_billing.ledger_files import read_settled, segments_of
from antefix_billing.reconcile import verify
from antefix_billing.usage_record import Status
from tests.billing.usage_records import opened, record

IDS = st.sampled_from([f"r{number}" for number in range(12)])


class LedgerMachine(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.directory = Path(tempfile.mkdtemp(prefix="antefix-ledger-"))
        self.ledger = Ledger(self.directory, segment_bytes=3000)
        self.charged = {}
        self.open = set()

    @rule(names=st.lists(IDS, min_size=1, max_size=4))
    def admit(self, names):
        self.ledger.append([opened(name) for name in names])
        self.open |= set(names)

    @rule(names=st.lists(IDS, min_size=1, max_size=4), output=st.integers(0, 1000), status=st.sampled_from(Status))
    def settle(self, names, output, status):
        price = 1 if output or not status.is_ours else 0
        items = []
        for name in names:
            attempt = self.charged.get(name, {}).get("attempt", 0) + 1
            items.append(record(name, output_tokens=output, status=status, price=price, attempt=attempt))
        for name, item, answer in zip(names, items, self.ledger.append(items), strict=True):
            known = self.charged.get(name)
            if known is None or (not known["final"] and known["attempt"] < item.attempt):
                is_final = status in (Status.STOP, Status.LENGTH)
                known = {"attempt": item.attempt, "final": is_final, "output": output}
                self.charged[name] = known
                self.open.discard(name)
            assert answer.record.output_tokens == known["output"]

    @rule()
    def reopen(self):
        self.ledger.close()
        self.ledger = Ledger(self.directory, segment_bytes=3000)

    @rule(seed=st.integers(0, 1 << 30))
    def crash_with_a_torn_tail(self, seed):
        """What was never acknowledged lies half written behind what was."""
        self.ledger.close()
        last = segments_of(self.directory)[-1]
        rng = random.Random(seed)
        with last.open("ab") as file:
            file.write(rng.randbytes(rng.randrange(200)))
        self.ledger = Ledger(self.directory, segment_bytes=3000)

    @rule()
    def lose_the_index(self):
        self.ledger.close()
        shutil.rmtree(self.directory / "index")
        self.ledger = Ledger(self.directory, segment_bytes=3000)

    @invariant()
    def open_entries_are_known(self):
        assert {entry.request_id for entry in self.ledger.unsettled()} == self.open

    def teardown(self):
        self.ledger.close()
        last = {item.record.request_id: item.record for item in read_settled(self.directory)}
        assert {name: item.output_tokens for name, item in last.items()} == {
            name: known["output"] for name, known in self.charged.items()
        }
        verdict = verify(self.directory)
        assert verdict.ok and verdict.open_requests == len(self.open)
        shutil.rmtree(self.directory)


TestLedgerMachine = LedgerMachine.TestCase
TestLedgerMachine.pytestmark = [pytest.mark.slow]
TestLedgerMachine.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)
