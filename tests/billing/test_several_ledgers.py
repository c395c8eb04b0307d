"""Several routers, one ledger each: a deployment's usage is their sum, and no request is charged by two routers."""

import json
import shutil
from argparse import ArgumentParser

import pytest

from antefix.errors import ConfigError
from antefix.store_files.hit_log import StoreLog
from antefix_billing.ledger import Ledger
from antefix_billing.ledger_files import ledgers_of
from antefix_console.commands import usage as cli
from tests.billing.usage_records import record


@pytest.fixture
def data(tmp_path):
    for name, ids in (("ledger", "ab"), ("ledger-2", "cde")):
        ledger = Ledger(tmp_path / "data" / name)
        for each in ids:
            ledger.append([record(each, hit=0, miss=9)])
        ledger.close()
    (tmp_path / "data" / "logs").mkdir()
    return tmp_path / "data"


def run(capsys, *words):
    """(exit status, standard output, standard error) of `antefix usage ...`."""
    parser = ArgumentParser()
    cli.add_parser(parser.add_subparsers())
    status = cli.run(parser.parse_args(["usage", *map(str, words)]))
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def verified(capsys, *words):
    status, out, _ = run(capsys, "verify", *words)
    return status, json.loads(out)


def test_all_ledgers_of_a_deployment_are_verified_together(data, capsys):
    for named in ((data,), (data / "ledger", data / "ledger-2")):
        status, verdict = verified(capsys, "--ledger", *named)
        assert status == 0 and verdict["ok"] and verdict["chain_ok"]
        assert (verdict["records"], [each["records"] for each in verdict["ledgers"]]) == (5, [2, 3])
    status, alone = verified(capsys, "--ledger", data / "ledger")
    assert status == 0 and alone["records"] == 2 and "ledgers" not in alone


def test_a_request_that_two_ledgers_charged_is_a_duplicate(data, capsys):
    ledger = Ledger(data / "ledger-2")
    ledger.append([record("a", hit=0, miss=9)])
    ledger.close()
    status, verdict = verified(capsys, "--ledger", data)
    assert status == 1 and verdict["duplicates"] == 1 and not verdict["ok"]
    assert verified(capsys, "--ledger", data / "ledger-2")[0] == 0


def test_damage_to_one_of_them_is_found(data, capsys):
    path = next((data / "ledger-2").glob("*.ledger"))
    path.write_bytes(path.read_bytes().replace(b'"request_id":"d"', b'"request_id":"x"'))
    status, verdict = verified(capsys, "--ledger", data)
    assert status == 1 and not verdict["chain_ok"]
    assert [each["chain_ok"] for each in verdict["ledgers"]] == [True, False]


def test_the_stores_log_supports_the_hits_of_all(data, capsys, tmp_path):
    for name in ("ledger", "ledger-2"):
        ledger = Ledger(data / name)
        ledger.append([record(f"hit in {name}")])
        ledger.close()
    log = StoreLog(tmp_path / "log")
    status, verdict = verified(capsys, "--ledger", data, "--store-log", tmp_path / "log")
    assert status == 1 and verdict["unsupported_hits"] == 2
    log.close()


def test_an_anchor_says_whose_it_is(data, capsys):
    _, verdict = verified(capsys, "--ledger", data)
    sources = [(data / name / "source").read_text().strip() for name in ("ledger", "ledger-2")]
    anchors = [
        f"{source}:{each['head_sequence']}:{each['head_hash']}"
        for source, each in zip(sources, verdict["ledgers"], strict=True)
    ]
    words = [word for anchor in anchors for word in ("--anchor", anchor)]
    assert verified(capsys, "--ledger", data, *words)[0] == 0
    other = f"{sources[0]}:{verdict['ledgers'][1]['head_sequence']}:{verdict['ledgers'][1]['head_hash']}"
    assert verified(capsys, "--ledger", data, "--anchor", other)[0] == 1
    status, _, error = run(capsys, "verify", "--ledger", data, "--anchor", anchors[0].partition(":")[2])
    assert status == 2 and "source" in error
    status, _, error = run(capsys, "verify", "--ledger", data / "ledger", "--anchor", anchors[1])
    assert status == 2 and "not one of the given" in error


def test_exports_and_reports_take_them_together(data, capsys):
    status, out, _ = run(capsys, "export", "--ledger", data, "--format", "jsonl")
    rows = [json.loads(line) for line in out.splitlines()]
    assert status == 0 and [row["request_id"] for row in rows] == list("abcde")
    status, out, _ = run(capsys, "report", "--ledger", data, "--by", "model", "--json")
    assert status == 0 and json.loads(out)[0]["requests"] == 5
    status, _, error = run(capsys, "export", "--ledger", data, "--after", "1")
    assert status == 2 and "one ledger" in error


def test_what_is_no_ledger_or_a_copy_is_refused(data, tmp_path):
    with pytest.raises(ConfigError, match="holds none"):
        ledgers_of([data / "logs"])
    with pytest.raises(ConfigError, match="same source"):
        ledgers_of([data, data / "ledger"])
    shutil.copytree(data / "ledger", data / "ledger-copy")
    with pytest.raises(ConfigError, match="same source"):
        ledgers_of([data])


def test_two_routers_cannot_write_one_ledger(data):
    first = Ledger(data / "ledger")
    with pytest.raises(ConfigError, match="a directory of its own"):
        Ledger(data / "ledger")
    first.close()
    Ledger(data / "ledger").close()
