"""The tables of faults and soaks: one row per fault, and a verdict per series."""

from benchmarks import tables_faults
from benchmarks.tables_faults import an_hour_with_short_ttls, recoveries

SERIES = {"first": 20.0, "half": 21.0, "last": 21.0, "rise": 0.1, "allowed": 1.5, "flat": True}
LEAK = {**SERIES, "last": 26.0, "rise": 5.0, "flat": False}
BOUNDED = {"segments_max": 4, "segments_of_store_max": 16, "segments": [0, 4, 4, 4, 4, 4, 4, 4, 4, 4, 3, 2]}


def test_each_fault_has_one_row_with_the_longest_time_of_older_runs():
    def found(*times):
        return {
            "times": len(times),
            "recovery_p50_s": times[0],
            "recovery_p99_s": times[-1],
            "recovery_max_s": times[-1],
        }

    records = {file: {"by_fault": {}} for file in tables_faults._REAL}
    records["faults_recovery.json"] = {"by_fault": {"kill router": found(1.0, 2.0)}}
    records["faults.json"] = {"by_fault": {"kill router": found(30.0, 40.0), "full disk": found(20.0)}}
    records["faults_load.json"] = {"by_fault": {"kill router": found(35.0)}}
    assert list(recoveries(records))[1:] == [
        ("full disk", "", "", "", "1", "20.0"),
        ("kill router", "2", "1.0", "2.0", "3", "40.0"),
    ]


def verdicts(**series):
    rows = list(an_hour_with_short_ttls({"growth": {"decode": series}}))
    return {row[0]: row[-1] for row in rows[1:]}


def test_a_kind_of_descriptors_that_leaks_has_a_row_of_its_own():
    assert verdicts(files=SERIES, sockets=SERIES) == {"decode: descriptors": "yes"}
    assert verdicts(files=SERIES, sockets=LEAK) == {"decode: descriptors": "yes", "decode: sockets": "no"}


def test_open_segments_are_held_to_their_bound():
    assert verdicts(bounded_files=BOUNDED) == {"decode: open segments": "never above its bound: 4 at most"}
    assert verdicts(bounded_files={**BOUNDED, "segments_max": 17}) == {"decode: open segments": "no"}
    kept = {**BOUNDED, "deleted_segment_open_s": 600.0, "deleted_segment_open_s_max": 30.0}
    assert verdicts(bounded_files=kept) == {"decode: open segments": "no, a deleted one was open for 600 s"}
