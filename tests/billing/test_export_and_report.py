import csv
import io
import json
from argparse import ArgumentParser
from decimal import Decimal

import pytest

from antefix.miss_reason import MissReason
from antefix_billing.adjustment import Adjustment, AdjustmentKind
from antefix_billing.export import EVENTS_A_BATCH, cloud_event_batches
from antefix_billing.ledger import Ledger
from antefix_billing.ledger_files import read_settled
from antefix_billing.pricing import moment_of
from antefix_billing.ratecard import load_cards
from antefix_billing.usage_record import Status
from antefix_billing.usage_report import remedies, remedies_text, summarize
from antefix_console.commands import usage as cli
from tests.billing.test_ratecard import DEPLOY
from tests.billing.usage_records import NOW_US, record

DAY_US = 86_400_000_000


@pytest.fixture
def directory(tmp_path):
    ledger = Ledger(tmp_path / "ledger")
    ledger.append(
        [
            record("a", currency="USD", price=Decimal("0.000000000001"), saved=Decimal("1.5")),
            record("b", currency="USD", price=Decimal("0.2"), tenant="=cmd", hit=0, miss=5),
            record("c", currency="EUR", price=Decimal("0.3"), status=Status.CANCELLED, finished_us=NOW_US + DAY_US),
        ]
    )
    ledger.close()
    return tmp_path / "ledger"


def run(*words):
    parser = ArgumentParser()
    cli.add_parser(parser.add_subparsers())
    return cli.run(parser.parse_args(["usage", *map(str, words)]))


def test_cloud_events_have_what_openmeter_asks_for(directory):
    (batch,) = cloud_event_batches(read_settled(directory))
    assert len({(event["source"], event["id"]) for event in batch}) == 3
    for event in batch:
        assert event["specversion"] == "1.0" and event["type"] == "antefix.usage" and event["subject"]
        assert event["time"].endswith("Z") and event["datacontenttype"] == "application/json"
        assert event["data"]["cache_hit_tokens"] + event["data"]["cache_miss_tokens"] == event["data"]["prompt_tokens"]
    assert batch[0]["data"]["price"] == "0.000000000001"


def test_batches_are_bounded(directory):
    settled = list(read_settled(directory)) * 700
    sizes = [len(batch) for batch in cloud_event_batches(settled)]
    assert max(sizes) <= EVENTS_A_BATCH and sum(sizes) == 2100


def test_json_lines_and_csv_hold_every_record(directory, tmp_path, capsys):
    assert run("export", "--ledger", directory, "--format", "jsonl") == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["request_id"] for row in rows] == ["a", "b", "c"]
    out = tmp_path / "usage.csv"
    assert run("export", "--ledger", directory, "--format", "csv", "--output", out) == 0
    with out.open() as file:
        cells = list(csv.DictReader(file))
    assert [cell["prompt_tokens"] for cell in cells] == [str(row["prompt_tokens"]) for row in rows]
    assert cells[1]["tenant"] == "'=cmd"  # never a formula in a spreadsheet


def test_parquet_keeps_money_exact(directory, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    out = tmp_path / "usage.parquet"
    assert run("export", "--ledger", directory, "--format", "parquet", "--output", out) == 0
    table = parquet.read_table(out).to_pylist()
    assert sum(row["price"] for row in table) == Decimal("0.500000000001")
    assert [row["status"] for row in table] == ["stop", "stop", "cancelled"]


def test_export_takes_a_cursor_a_tenant_and_a_time(directory, capsys):
    assert run("export", "--ledger", directory, "--format", "jsonl", "--after", "2") == 0
    assert [json.loads(line)["request_id"] for line in capsys.readouterr().out.splitlines()] == ["c"]
    assert run("export", "--ledger", directory, "--format", "jsonl", "--tenant", "=cmd") == 0
    assert [json.loads(line)["request_id"] for line in capsys.readouterr().out.splitlines()] == ["b"]
    assert run("export", "--ledger", directory, "--format", "jsonl", "--until", "2001-01-01") == 0
    assert capsys.readouterr().out == ""


def test_report_sums_by_group_and_never_adds_currencies(directory):
    lines = summarize((item.record for item in read_settled(directory)), by=("model",))
    assert [(line.currency, line.requests, line.price) for line in lines] == [
        ("EUR", 1, Decimal("0.3")),
        ("USD", 2, Decimal("0.200000000001")),
    ]
    assert lines[1].cache_hit_tokens == 128 and lines[1].prompt_tokens == 205


@pytest.mark.usefixtures("plots")
def test_report_prints_a_table_json_and_a_plot(directory, tmp_path, capsys):
    plot = tmp_path / "usage.svg"
    assert run("report", "--ledger", directory, "--plot", plot) == 0
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 4 and table[0].split()[:3] == ["tenant", "model", "day"]
    assert plot.read_text().count("<svg") == 1
    assert run("report", "--ledger", directory, "--json", "--by", "tenant") == 0
    assert {row["tenant"] for row in json.loads(capsys.readouterr().out)} == {"acme", "=cmd"}
    assert run("report", "--ledger", directory, "--by", "colour") == 2


def test_verify_says_whether_the_chain_holds(directory, capsys):
    assert run("verify", "--ledger", directory) == 0
    verdict = json.loads(capsys.readouterr().out)
    assert (verdict["records"], verdict["chain_ok"], verdict["duplicates"]) == (3, True, 0)
    assert verdict["unsupported_hits"] is None
    anchor = f"{verdict['head_sequence']}:{verdict['head_hash']}"
    assert run("verify", "--ledger", directory, "--anchor", anchor) == 0
    assert run("verify", "--ledger", directory, "--anchor", f"9:{verdict['head_hash']}") == 1
    assert run("verify", "--ledger", directory / "nowhere") == 2


def test_receipts_are_issued_and_checked_from_the_command_line(directory, tmp_path, capsys):
    from antefix_billing.receipt import Signer

    key = tmp_path / "receipts.key"
    public = Signer.create(key).public_key.hex()
    assert run("receipt", "--ledger", directory, "--request-id", "c", "--key-file", key) == 0
    receipt = tmp_path / "receipt.json"
    receipt.write_text(capsys.readouterr().out)
    assert run("receipt", "--check", receipt, "--public-key", public) == 0
    assert run("receipt", "--check", receipt, "--public-key", "00" * 32) in (1, 2)


def test_a_reader_of_the_export_that_has_enough_is_no_error(directory, monkeypatch, capsys):
    class Left(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    monkeypatch.setattr("sys.stdout", Left())
    with pytest.raises(BrokenPipeError):  # `antefix` itself ends with 0 then, and says nothing
        run("export", "--ledger", directory, "--format", "jsonl")
    assert capsys.readouterr().err == ""


def test_misses_cost_what_hits_would_have_saved_by_reason(tmp_path):
    cards = load_cards([DEPLOY / "example.toml"])
    expired = record("a", hit=0, miss=1000, miss_reason=MissReason.EXPIRED)
    evicted = record("b", hit=500, miss=500, miss_reason=MissReason.EVICTED)
    failed = record(
        "c", hit=0, miss=1000, miss_reason=MissReason.EXPIRED, status=Status.FAILED, output_tokens=0, price=0
    )
    lines = summarize([expired, evicted, failed], ("miss_reason",), cards=cards)
    costs = {line.group[0]: line.missed for line in lines}
    a_token = (Decimal("0.10") - Decimal("0.01")) / 10**6
    assert costs == {"expired": 1000 * a_token, "evicted": 500 * a_token}
    saved = {row["miss_reason"]: Decimal(str(row["saves_at_most"])) for row in remedies([expired, evicted], cards)}
    assert saved == costs


def test_an_hour_is_a_group_and_adjustments_are_told_apart():
    made = Adjustment(
        adjustment_id="a", kind=AdjustmentKind.CREDIT, tenant="acme", amount=Decimal("-0.5"), currency="USD",
        reason="late", source="antefix/00", created_us=NOW_US,
    )  # fmt: skip
    (line,) = summarize([record(currency="USD")], ("hour",), adjustments=[made])
    assert line.group == (moment_of(NOW_US).strftime("%Y-%m-%dT%H:00Z"),)
    assert (line.requests, line.adjusted) == (1, Decimal("-0.5"))


def test_a_report_of_savings_says_that_there_are_none():
    assert remedies_text([], has_prices=True).startswith("no tokens that a longer time to live")
