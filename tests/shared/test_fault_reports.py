"""Runs of the faults' campaign are added up, each with all its faults and errors."""

from antefix_billing.ledger import Ledger
from benchmarks.fault_reports import added, bill, summed_up
from tests.billing.usage_records import record

RUN = {
    "seed": 1,
    "minutes": 2.0,
    "clients": 1,
    "faults": 2,
    "answers_checked": 10,
    "wrong": 0,
    "errors": {"Unavailable": 1},
    "not_recovered": [],
    "undisturbed_s": [1.0, 3.0],
    "recovery_s": {"kill router": [4.0], "full disk": [2.0]},
    "bill": {"records": 11, "double_billed": 0},
}
ABOUT = {"commit": "c", "date": "d", "machine": "m", "command": "python benchmarks/faults.py"}


def test_the_runs_of_two_seeds_are_added_up():
    more = {"seed": 2, "wrong": 1, "errors": {"Overloaded": 2}, "not_recovered": ["stop decode"]}
    other = {**RUN, **more, "recovery_s": {"kill router": [8.0]}}
    both = summed_up(added({**ABOUT, **summed_up(RUN)}, other))
    assert (both["minutes"], both["faults"], both["answers_checked"], both["wrong"]) == (4.0, 4, 20, 1)
    assert both["errors"] == {"Unavailable": 1, "Overloaded": 2}
    assert (both["not_recovered"], both["bill"]) == (["stop decode"], {"records": 22, "double_billed": 0})
    assert both["by_fault"]["kill router"] == {
        "times": 2, "recovery_p50_s": 6.0, "recovery_p99_s": 7.96, "recovery_max_s": 8.0
    }  # fmt: skip
    assert both["by_fault"]["full disk"]["times"] == 1
    assert both["runs"] == [{**ABOUT, "seed": 1, "minutes": 2.0}]
    third = added({**ABOUT, **both}, RUN)
    assert [run["seed"] for run in third["runs"]] == [1, 2]


def test_an_answer_without_a_record_is_counted(tmp_path):
    ledger = Ledger(tmp_path / "ledger")
    ledger.append([record("first"), record("second")])
    ledger.close()
    found = bill(tmp_path / "ledger", ["first", "second", "third"])
    assert (found["records"], found["double_billed"], found["not_billed"]) == (2, 0, 1)
