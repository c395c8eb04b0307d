import dataclasses
import hashlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from antefix.errors import InvalidRequest
from antefix.prompt_marks import marks_of, parting, parting_of_chain, places
from antefix.v1 import usage_pb2
from antefix_billing.export import ExportFormat, write_export, write_text
from antefix_billing.ledger_files import Settled
from antefix_billing.usage_record import UsageRecord
from antefix_billing.usage_report import as_json, as_text, summarize
from tests.billing.usage_records import record


def chain(*blocks):
    """Block hashes; each names all tokens up to its block's end."""
    hashes, last = [], b""
    for block in blocks:
        last = hashlib.blake2b(last + bytes([block]), digest_size=32).digest()
        hashes.append(last)
    return hashes


def test_few_marks_and_the_last_block_is_one():
    assert places(0) == [] and places(1) == [1] and places(13) == [1, 2, 3, 4, 6, 8, 12, 13]
    assert len(marks_of(chain(*[1] * 2000))) < 300 and marks_of([]) == ""


@given(st.integers(0, 300), st.integers(0, 300), st.integers(0, 300))
def test_prompts_part_where_they_are_said_to(shared, first, second):
    one, other = chain(*[1] * shared, *[2] * first), chain(*[1] * shared, *[3] * second)
    for found in (parting(marks_of(one), marks_of(other)), parting_of_chain(one, marks_of(other))):
        assert found.blocks_min <= shared <= found.blocks_max
        assert found.blocks_max <= max(1, found.blocks_min) * 1.5
    whole = parting(marks_of(one), marks_of(one))
    assert (whole.blocks_min, whole.blocks_max) == (len(one), len(one))


@pytest.mark.parametrize("marks", ["x", "1", "1:", "1:zz", "2:" + "a" * 12, "-1:" + "a" * 12])
def test_what_is_no_mark_is_refused(marks):
    with pytest.raises(InvalidRequest):
        parting(marks, marks_of(chain(1)))


def test_records_keep_both_fields_and_older_ones_have_none(tmp_path):
    marks = marks_of(chain(1, 2, 3))
    volatile = record(prefix_volatile=True, prompt_marks=marks)
    assert UsageRecord.from_payload(volatile.to_payload()) == volatile
    assert not {"prefix_volatile", "prompt_marks"} & json.loads(record().to_payload()).keys()
    wire = usage_pb2.UsageRecord(**volatile.to_dict())
    assert wire.prefix_volatile and wire.prompt_marks == marks
    place = {"sequence": 1, "hash": bytes(32), "previous_hash": bytes(32)}
    settled = [Settled(**place, record=each) for each in (volatile, record("b"))]
    lines = summarize([item.record for item in settled])
    assert json.loads(as_json(lines, ("tenant", "model", "day")))[0]["prefix_volatile"] == 1
    assert "volatile" in as_text(lines, ("tenant", "model", "day")).splitlines()[0]
    with (tmp_path / "out.jsonl").open("w+") as file:
        write_text(settled, ExportFormat.JSONL, file)
        file.seek(0)
        assert [json.loads(line)["prefix_volatile"] for line in file] == [True, False]
    parquet = pytest.importorskip("pyarrow.parquet")
    write_export(settled, ExportFormat.PARQUET, tmp_path / "out.parquet")
    rows = parquet.read_table(tmp_path / "out.parquet").to_pylist()
    assert [row["prefix_volatile"] for row in rows] == [True, False] and rows[0]["prompt_marks"] == marks
    assert dataclasses.replace(volatile, prefix_volatile=False) != volatile
