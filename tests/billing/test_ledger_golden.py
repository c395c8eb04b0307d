"""The ledger's format is permanent: a golden ledger stays readable, and docs/BILLING.md agrees with the code."""

import re
import shutil
from decimal import Decimal
from pathlib import Path

from antefix_billing import ledger_format
from antefix_billing.ledger import Ledger
from antefix_billing.ledger_files import read_settled
from antefix_billing.reconcile import verify
from antefix_billing.usage_record import Status
from tests.billing.usage_records import opened, record

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden" / "ledger-v1"
HEAD = "c8e98dec336e84d0964c96abaa46f2001f1ddfe560f034c55a17d58c8495bf8d"


def golden_records():
    return [
        record("charged", cache_write_tokens=64, reasoning_tokens=3, saved=Decimal("0.25"), rate_card="card/1"),
        record("cut off", hit=0, miss=0, output_tokens=0, status=Status.CRASHED, price=Decimal(0)),
        record("größer", tenant="ünïcode", status=Status.CANCELLED),
    ]


def write(directory):
    directory.mkdir(parents=True)
    (directory / "source").write_text("ab" * 16 + "\n")
    ledger = Ledger(directory)
    ledger.append([opened("charged"), opened("cut off")])
    for item in golden_records():
        ledger.append([item])
    ledger.close()


def test_the_golden_ledger_is_read_for_ever():
    verdict = verify(GOLDEN)
    assert verdict.ok and verdict.head_hash == HEAD
    assert [item.record for item in read_settled(GOLDEN)] == golden_records()


def test_todays_writer_writes_the_golden_bytes(tmp_path):
    write(tmp_path / "ledger")
    name = "usage-000000000001.ledger"
    assert (tmp_path / "ledger" / name).read_bytes() == (GOLDEN / name).read_bytes()


def test_todays_writer_goes_on_with_the_golden_ledger(tmp_path):
    shutil.copytree(GOLDEN, tmp_path / "ledger")
    ledger = Ledger(tmp_path / "ledger")
    assert ledger.find("acme:charged").record == golden_records()[0]
    ledger.append([record("new")])
    ledger.close()
    assert verify(tmp_path / "ledger").records == 4


def test_the_documents_tables_agree_with_the_code():
    text = (ROOT / "docs" / "BILLING.md").read_text()
    files = text[text.index("## Files") : text.index("## Checking")]
    header, entry = (
        [(int(offset), int(size)) for offset, size in re.findall(r"^\| (\d+) \| (\d+) \|", table, re.MULTILINE)]
        for table in files.split("| offset | size |")[1:]
    )
    for rows, nbytes in ((header, ledger_format.SEGMENT_HEADER_BYTES), (entry, ledger_format.ENTRY_HEADER_BYTES)):
        ends = [offset + size for offset, size in rows]
        assert [offset for offset, _ in rows] == [0, *ends[:-1]]
        assert ends[-1] == nbytes
    assert f"0x{ledger_format.ENTRY_MAGIC:X}" in files and f"at most {ledger_format.PAYLOAD_BYTES_MAX:,}" in files
