"""Seeded histories of the whole deployment in one process, with faults. All promises hold after each history.

The long run is `python -m benchmarks.histories --minutes 10`; a seed that fails there fails here.
"""

import os
import subprocess
import sys

import pytest

from antefix_billing.ledger import Ledger
from antefix_billing.usage_record import UsageRecord
from antefix_kvstore.storage_engine import StorageEngine
from antefix_router.inflight import InFlight
from antefix_router.placement.leases import Leases
from antefix_router.placement.workers import WorkerRole
from tests.histories import workers
from tests.histories.history import run_history

pytestmark = pytest.mark.slow

NUM_HISTORIES = 30


def test_what_was_promised_holds_in_every_history():
    outcomes = [run_history(seed) for seed in range(NUM_HISTORIES)]
    assert {outcome.seed: outcome.error for outcome in outcomes if outcome.error} == {}
    assert min(outcome.num_operations for outcome in outcomes) >= 50
    assert min(outcome.counts["faults"] for outcome in outcomes) >= 1
    assert sum(outcome.counts["answers checked"] for outcome in outcomes) >= 10 * NUM_HISTORIES


def test_a_seed_replays_exactly():
    assert run_history(7).trace == run_history(7).trace != run_history(8).trace


def test_a_seed_replays_exactly_whatever_addresses_objects_have():
    """In seed 43 a router dies with several requests. When a set gave the order of their ends, each run differed."""
    first = run_history(43)
    moved = [object() for _ in range(3043)]
    assert first.counts["faults"] >= 1
    assert [run_history(43).trace, len(moved)] == [first.trace, 3043]


@pytest.mark.services
def test_a_seed_replays_exactly_in_another_process():
    program = "from tests.histories.history import run_history; print(run_history(7).trace, run_history(11).trace)"
    traces = {
        subprocess.run(
            [sys.executable, "-c", program],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert traces == {f"{run_history(7).trace} {run_history(11).trace}\n"}


def wrong_token(monkeypatch):
    right = workers.token_of
    monkeypatch.setattr(workers, "token_of", lambda tokens, number: right(tokens, number) ^ (number == 3))


def acknowledged_before_it_is_stored(monkeypatch):
    right = StorageEngine.put_group

    def put_group(self, puts):
        results = right(self, puts)
        if self.counters.puts % 5 == 0:
            self.segments.rollback(4096)
        return results

    monkeypatch.setattr(StorageEngine, "put_group", put_group)


def settled_and_not_written(monkeypatch):
    right = Ledger._write

    def write(self, data):
        right(self, data if self.sequence % 7 else b"")

    monkeypatch.setattr(Ledger, "_write", write)


def charged_twice(monkeypatch):
    monkeypatch.setattr(Ledger, "_find", lambda self, key: None)
    monkeypatch.setattr("antefix_router.accounting.LedgerWriter.find", lambda self, key: _nothing())


async def _nothing():
    return None


def leader_that_wakes_nobody(monkeypatch):
    monkeypatch.setattr(InFlight, "end", lambda self, claimed: None)


def events_that_are_lost(monkeypatch):
    monkeypatch.setattr("antefix_kvstore.event_log.EventLog.publish", lambda self, changes: None)


def misses_that_are_forgotten(monkeypatch):
    right = UsageRecord.of.__func__

    def of(cls, used, **fields):
        record = right(cls, used, **fields)
        object.__setattr__(record, "cache_hit_tokens", record.cache_hit_tokens + 8 * bool(record.cache_hit_tokens))
        return record

    monkeypatch.setattr(UsageRecord, "of", classmethod(of))


def leases_that_are_not_renewed(monkeypatch):
    right = Leases.renew

    def renew(self, role_name, address, **lease):
        if (WorkerRole(role_name), address) not in self._leases:
            right(self, role_name, address, **lease)

    monkeypatch.setattr(Leases, "renew", renew)


PLANTED = [
    leases_that_are_not_renewed,
    wrong_token,
    acknowledged_before_it_is_stored,
    settled_and_not_written,
    charged_twice,
    leader_that_wakes_nobody,
    events_that_are_lost,
    misses_that_are_forgotten,
]


@pytest.mark.parametrize("plant", PLANTED)
def test_a_planted_fault_is_found(monkeypatch, plant):
    plant(monkeypatch)
    assert any(run_history(seed).error for seed in range(12))
