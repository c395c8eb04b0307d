"""`antefix usage adjust` and `rerate` from the command line."""

import json

import pytest

from antefix_billing.ledger import Ledger
from antefix_billing.ledger_files import read_billed
from antefix_billing.pricing import priced
from antefix_billing.ratecard import load_cards
from antefix_console.cli import main
from tests.billing.test_live_books import FIRST
from tests.billing.usage_records import record


@pytest.fixture
def ledger(tmp_path):
    (tmp_path / "cards.toml").write_text(FIRST)
    cards = load_cards([tmp_path / "cards.toml"])
    ledger = Ledger(tmp_path / "ledger")
    ledger.append([priced(record("r1", hit=0, miss=100), cards)])
    ledger.close()
    return tmp_path / "ledger"


def run(capsys, *args):
    status = main(["usage", *args])
    return status, capsys.readouterr()


def test_a_credit_names_the_request_it_is_for(ledger, capsys):
    args = ("adjust", "--ledger", str(ledger), "--reason", "late", "--json")
    status, said = run(capsys, *args, "--amount=-0.25", "--request-id", "r1", "--reference", "T-17", "--id", "t17")
    made = json.loads(said.out)
    assert (status, made["amount"], made["currency"], made["tenant"]) == (0, "-0.25", "USD", "acme")
    assert (made["of_event"], made["reference"], made["kind"]) == ("acme:r1", "T-17", "credit")
    for wrong in (("--amount=0.25",), ("--amount=x",), ("--amount=-1", "--currency", "EUR"), ("--amount=nan",)):
        assert run(capsys, *args, *wrong, "--request-id", "r1")[0] == 2
    assert run(capsys, *args, "--amount=-1", "--request-id", "none")[0] == 2
    assert len(list(read_billed(ledger))) == 2


def test_a_rerating_says_what_it_would_change_and_changes_it_once(ledger, tmp_path, capsys):
    (tmp_path / "cards.toml").write_text(FIRST.replace('"1.00"', '"3.00"'))
    args = ("rerate", "--ledger", str(ledger), "--ratecards", str(tmp_path / "cards.toml"), "--json")
    assert json.loads(run(capsys, *args, "--dry-run")[1].out) == {
        "records": 1,
        "amounts": {"USD": "0.00020"},
        "written": False,
    }
    assert json.loads(run(capsys, *args, "--tenant", "other")[1].out)["records"] == 0
    assert [json.loads(run(capsys, *args)[1].out)["records"] for _ in range(2)] == [1, 0]
    assert len(list(read_billed(ledger))) == 2
