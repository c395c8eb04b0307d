"""One list of miss reasons for the store, workers, the bill, metrics, headers, `explain` and the documents."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from antefix.miss_reason import MissReason
from antefix.record import BlockFate
from antefix.restore_report import RestoreReport
from antefix.store.fate_wire import fate_from_wire, fate_to_wire
from antefix.v1 import kvstore_pb2, worker_pb2
from antefix.wire import report_from_wire, report_to_wire
from antefix_console.explain.text import ADVICE

ROOT = Path(__file__).parents[2]
# Reasons that a bill never gives for its first miss.
ELSEWHERE = {MissReason.NONE, MissReason.UNREACHABLE, MissReason.UNKNOWN}


def test_the_bills_document_explains_each_reason() -> None:
    table = (ROOT / "docs" / "BILLING.md").read_text().split("| miss reason |")[1].split("\n\n")[0]
    named = {name for row in table.splitlines()[2:] for name in re.findall(r"`(\w+)`", row.split("|")[1])}
    assert named == {reason.value for reason in set(MissReason) - ELSEWHERE}


def test_explain_has_advice_for_each_reason() -> None:
    assert ADVICE.keys() == set(MissReason) - {MissReason.NONE}


@pytest.mark.parametrize("reason", MissReason)
def test_a_report_keeps_its_reason_on_the_wire(reason: MissReason) -> None:
    report = RestoreReport(miss_reason=reason)
    back = report_from_wire(worker_pb2.RestoreReport.FromString(report_to_wire(report).SerializeToString()))
    assert back == report and back.miss_reason is reason


@pytest.mark.parametrize("reason", sorted(set(MissReason) - {MissReason.UNKNOWN}))
def test_a_blocks_fate_keeps_its_reason_on_the_wire(reason: MissReason) -> None:
    fate = BlockFate(reason=reason, fingerprints=(b"f",), statements=(b"s",))
    assert fate_from_wire(kvstore_pb2.FateResponse.FromString(fate_to_wire(fate).SerializeToString())) == fate


def test_a_stores_older_words_are_kept() -> None:
    assert fate_to_wire(BlockFate(reason=MissReason.NONE)).fate == "stored"
    assert fate_to_wire(BlockFate(reason=MissReason.FIRST_SEEN)).fate == "unknown"
    assert fate_from_wire(kvstore_pb2.FateResponse(fate="of 2030")).reason is MissReason.UNKNOWN


def test_a_newer_workers_reason_is_unknown() -> None:
    assert report_from_wire(worker_pb2.RestoreReport(miss_reason="of 2030")).miss_reason is MissReason.UNKNOWN


def test_nowhere_else_is_a_reason_spelled_as_a_bare_string() -> None:
    spelled = re.compile(r"[\"'](first_seen|window_missing|below_minimum|fingerprint_differs|arithmetic_differs)[\"']")
    rooms = ("antefix", "billing", "console", "decode", "kvstore", "prefill", "router", "simulate")
    sources = (path for room in rooms for path in (ROOT / room).rglob("*.py") if "v1" not in path.parts)
    found = {path.relative_to(ROOT).as_posix() for path in sources if spelled.search(path.read_text())}
    assert found == {"antefix/miss_reason.py"}
