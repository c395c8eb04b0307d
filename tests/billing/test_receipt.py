import json
import stat
from decimal import Decimal

import pytest

from antefix.errors import ConfigError, InvalidRequest
from antefix_billing.ledger import Ledger
from antefix_billing.pricing import priced
from antefix_billing.ratecard import load_cards
from antefix_billing.receipt import Signer, check_receipt
from tests.billing.test_ratecard import DEPLOY
from tests.billing.usage_records import record


@pytest.fixture
def cards():
    return load_cards([DEPLOY / "example.toml"])


@pytest.fixture
def issued(tmp_path, cards):
    ledger = Ledger(tmp_path / "ledger")
    ledger.append([record("first"), priced(record("mine"), cards)])
    signer = Signer.create(tmp_path / "receipts.key")
    receipt = signer.receipt(ledger.find("acme:mine"), ledger.source)
    ledger.close()
    return json.loads(json.dumps(receipt)), signer.public_key


def test_a_receipt_checks_with_the_public_key_alone(issued, cards):
    receipt, key = issued
    checked = check_receipt(receipt, key, cards)
    assert checked.ok and checked.price_ok
    assert checked.record.request_id == "mine"


@pytest.mark.parametrize("name", ["payload", "sequence", "previous_hash", "hash", "source", "signature"])
def test_a_changed_receipt_fails(issued, name):
    receipt, key = issued
    if name == "sequence":
        receipt[name] += 1
    elif name == "payload":
        receipt[name] = receipt[name].replace('"output_tokens":10', '"output_tokens":11')
    else:
        receipt[name] = ("0" if receipt[name][0] != "0" else "1") + receipt[name][1:]
    assert not check_receipt(receipt, key).ok


def test_another_key_fails(issued, tmp_path):
    receipt, _ = issued
    assert not check_receipt(receipt, Signer.create(tmp_path / "other.key").public_key).ok


def test_a_price_that_is_not_the_cards_shows(tmp_path, cards):
    ledger = Ledger(tmp_path / "ledger")
    dear = priced(record("mine"), cards)
    ledger.append([record("mine", price=dear.price + Decimal("0.1"), rate_card=dear.rate_card, currency="EUR")])
    signer = Signer.create(tmp_path / "receipts.key")
    checked = check_receipt(signer.receipt(ledger.find("acme:mine"), ledger.source), signer.public_key, cards)
    assert checked.signature_ok and checked.hash_ok and checked.price_ok is False and not checked.ok


def test_what_is_not_a_receipt_is_refused(issued):
    with pytest.raises(InvalidRequest):
        check_receipt({"payload": "x"}, issued[1])


def test_the_private_key_is_the_owners_alone(tmp_path):
    path = tmp_path / "receipts.key"
    assert Signer.create(path).public_key == Signer.create(path).public_key
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.write_text("not hex")
    with pytest.raises(ConfigError):
        Signer.from_file(path)
