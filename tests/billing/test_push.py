"""Usage reaches a billing system once, whatever breaks: by stable ids, cursors on disk, and dead letters."""

import base64
import hashlib
import hmac
import importlib.util
import json
from decimal import Decimal

import pytest

from antefix.errors import ConfigError
from antefix_billing.adjustment import Adjustment, AdjustmentKind
from antefix_billing.ledger import Ledger
from antefix_billing.push.push_config import SinkConfig, load_sinks
from antefix_billing.push.pusher import Pusher
from antefix_billing.push.sinks import open_sink
from antefix_console.cli import main
from tests.billing.billing_systems import BillingSystem
from tests.billing.usage_records import record

pytestmark = pytest.mark.slow

CLIENTS = {"webhook": "json", "openmeter": "openmeter", "lago": "lago_python_client", "stripe": "stripe"}


def installed(*kinds):
    return [
        pytest.param(
            kind,
            marks=[
                *([] if importlib.util.find_spec(CLIENTS[kind]) else [pytest.mark.skip(f"{CLIENTS[kind]} is missing")]),
                *([] if kind == "webhook" else [pytest.mark.slow]),
            ],
        )
        for kind in kinds
    ]


ALL = installed(*CLIENTS)


@pytest.fixture
def system():
    system = BillingSystem()
    yield system
    system.close()


def write(directory, numbers, **changes):
    ledger = Ledger(directory)
    ledger.append([record(f"r{number}", source=ledger.source_name, **changes) for number in numbers])
    ledger.close()


@pytest.fixture
def ledger(tmp_path):
    write(tmp_path / "ledger", range(5), price=Decimal("0.000123456789"))
    return tmp_path / "ledger"


def pusher_of(kind, system, ledger, sleep=None, **settings):
    waits = iter(range(20))
    sleep = sleep or (lambda seconds: next(waits, None) is None)
    config = SinkConfig(
        name=kind, kind=kind, url=system.url, key="secret",
        **{"unmapped": "name", "meters": {"miss": "cache_miss_tokens", "hit": "cache_hit_tokens"}, **settings},
    )  # fmt: skip
    (ledger.parent / "state").mkdir(exist_ok=True)
    return Pusher(config, open_sink(config), [ledger], ledger.parent / "state", sleep=sleep)


@pytest.mark.parametrize("kind", ALL)
def test_each_record_is_taken_once_though_answers_are_lost_and_the_pusher_starts_again(kind, system, ledger, tmp_path):
    system.answers = [500, 503, 429]
    pusher = pusher_of(kind, system, ledger)
    assert pusher.backlog() == 5 and pusher.push()
    assert pusher.counters.failed >= 1 and (pusher.backlog(), pusher.num_dead) == (0, 0)
    num = 10 if kind == "stripe" else 5
    assert len(system.taken) == num
    # After a crash between sending and noting, all events are sent again.
    (tmp_path / "state" / f"{kind}.json").unlink()
    assert pusher_of(kind, system, ledger).push() and len(system.taken) == num
    calls = system.num_calls
    assert pusher_of(kind, system, ledger).push() and system.num_calls == calls
    write(ledger, [9])
    assert pusher_of(kind, system, ledger).push() and len(system.taken) == num + num // 5


@pytest.mark.parametrize("kind", installed("webhook", "openmeter"))
def test_counts_and_money_arrive_to_the_last_decimal(kind, system, ledger):
    pusher_of(kind, system, ledger, customers={"acme": "cus_1"}).push()
    events = list(system.taken.values())
    assert {event["subject"] for event in events} == {"cus_1"}
    assert {event["data"]["price"] for event in events} == {"0.000123456789"}
    assert sum(event["data"]["prompt_tokens"] for event in events) == 5 * 200


@pytest.mark.parametrize("kind", installed("lago"))
def test_lago_gets_the_exact_price_and_the_subscription(kind, system, ledger):
    pusher_of(kind, system, ledger, customers={"acme": "sub_1"}, code="tokens").push()
    event = next(iter(system.taken.values()))
    assert (event["external_subscription_id"], event["code"]) == ("sub_1", "tokens")
    assert event["precise_total_amount_cents"] == "0.012345678900"
    assert event["properties"]["prompt_tokens"] == "200"


@pytest.mark.parametrize("kind", installed("stripe"))
def test_stripe_gets_a_meter_event_for_each_count(kind, system, ledger):
    pusher_of(kind, system, ledger, customers={"acme": "cus_1"}).push()
    sums = {}
    for event in system.taken.values():
        assert event["payload[stripe_customer_id]"] == "cus_1"
        sums[event["event_name"]] = sums.get(event["event_name"], 0) + int(event["payload[value]"])
    assert sums == {"miss": 5 * 72, "hit": 5 * 128}


@pytest.mark.parametrize("kind", ALL)
def test_what_is_refused_for_good_is_a_dead_letter_and_the_rest_goes_on(kind, system, ledger):
    system.refuse = lambda id, event: 422 if "r3" in json.dumps(event) else None
    if kind == "stripe":
        numbers = iter(range(100))
        system.refuse = lambda id, event: 400 if next(numbers) == 4 else None
    pusher = pusher_of(kind, system, ledger)
    assert pusher.push() and pusher.num_dead == 1 and pusher.backlog() == 0
    system.refuse = lambda id, event: None
    assert pusher.push_dead() == 0 and len(system.taken) == (10 if kind == "stripe" else 5)


@pytest.mark.parametrize(
    "harm",
    [b"\xff\x00{", b"", b"[1]", b"5", b"[" * 9999, b'{"ledger": "a"}', b'{"ledger": 1, "sequence": "x", "why": 2}'],
)
def test_a_damaged_line_of_dead_letters_stays_and_stops_nobody(system, ledger, tmp_path, caplog, harm):
    system.refuse = lambda id, event: 422 if "r3" in json.dumps(event) or "r4" in json.dumps(event) else None
    assert pusher_of("webhook", system, ledger).push()
    path = tmp_path / "state" / "webhook.dead"
    second = path.read_bytes().splitlines()[1]
    path.write_bytes(harm + b"\n" + second + b"\n")
    write(ledger, [13, 14])
    pusher = pusher_of("webhook", system, ledger)
    system.refuse = lambda id, event: 422 if "r13" in json.dumps(event) else None
    assert pusher.push() and pusher.num_dead == 3
    assert caplog.text.count("damaged lines: 1") == 1
    system.refuse = lambda id, event: None
    assert pusher.push_dead() == 1 == pusher.num_dead
    assert path.read_bytes() == harm + b"\n" and len(system.taken) == 6


@pytest.mark.parametrize("num_left", [60, -2, -1])
def test_a_dead_letter_that_a_crash_cut_off_takes_no_other_with_it(system, ledger, tmp_path, num_left):
    system.refuse = lambda id, event: 422 if "r3" in json.dumps(event) else None
    assert pusher_of("webhook", system, ledger).push()
    path, cursors = tmp_path / "state" / "webhook.dead", tmp_path / "state" / "webhook.json"
    whole = path.read_bytes()
    path.write_bytes(whole[:num_left])
    cursors.unlink()
    assert pusher_of("webhook", system, ledger).push() and path.read_bytes().strip() == whole.strip()
    # The next one is of another entry.
    path.write_bytes(whole[:num_left])
    write(ledger, [9])
    system.refuse = lambda id, event: 422 if "r9" in json.dumps(event) else None
    pusher = pusher_of("webhook", system, ledger)
    assert pusher.push() and pusher.num_dead == 2
    assert path.read_bytes().startswith(whole[:num_left] + b"\n{")


def test_many_dead_letters_are_not_read_again_for_each_one(system, ledger, monkeypatch):
    write(ledger, range(5, 300))
    pusher = pusher_of("webhook", system, ledger, unmapped="dead_letter")
    reads, read = [], Pusher._read_dead
    monkeypatch.setattr(Pusher, "_read_dead", lambda self: reads.append(1) or read(self))
    assert pusher.push() and len(reads) <= 2
    assert pusher.num_dead == 300
    # A letter that somebody removed is written again, and one that is there is not.
    path = ledger.parent / "state" / "webhook.dead"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))
    pusher.cursors.clear()
    assert pusher.push() and pusher.num_dead == 300


def test_a_tenant_without_a_customer_waits_as_a_dead_letter_or_is_skipped(system, ledger):
    pusher = pusher_of("webhook", system, ledger, unmapped="dead_letter")
    assert pusher.push() and (pusher.num_dead, len(system.taken)) == (5, 0)
    mapped = pusher_of("webhook", system, ledger, unmapped="dead_letter", customers={"acme": "c"})
    assert mapped.push_dead() == 0 and len(system.taken) == 5
    skipping = pusher_of("webhook", system, ledger, unmapped="skip")
    assert skipping.num_dead == 0


def test_a_receiver_that_is_away_or_knows_no_key_loses_nothing(system, ledger):
    system.answers = [401, 401, 403]
    waits = []
    pusher = pusher_of("webhook", system, ledger, sleep=lambda seconds: waits.append(seconds) or len(waits) == 2)
    assert not pusher.push() and pusher.backlog() == 5 and waits == [0.5, 1.0]
    assert pusher_of("webhook", system, ledger).push() and len(system.taken) == 5


def test_a_webhook_is_signed_as_standard_webhooks_says(system, ledger):
    pusher_of("webhook", system, ledger).push()
    head, body = {name.lower(): value for name, value in system.heads[-1].items()}, system.bodies[-1]
    signed = f"{head['webhook-id']}.{head['webhook-timestamp']}.".encode() + body
    made = base64.b64encode(hmac.new(b"secret", signed, hashlib.sha256).digest()).decode()
    assert head["webhook-signature"] == f"v1,{made}"


def test_adjustments_are_sent_among_the_records(system, ledger):
    made = Ledger(ledger)
    made.append([Adjustment(
        adjustment_id="a", kind=AdjustmentKind.CREDIT, tenant="acme", amount=Decimal("-0.5"), currency="USD",
        reason="late", source=made.source_name, created_us=1,
    )])  # fmt: skip
    made.close()
    pusher_of("webhook", system, ledger).push()
    event = next(event for event in system.taken.values() if event["type"] == "antefix.adjustment")
    assert (event["data"]["amount"], event["data"]["kind"]) == ("-0.5", "credit")


def test_settings_that_would_send_a_key_in_clear_are_refused(tmp_path):
    (tmp_path / "key").write_text("k\n")
    (tmp_path / "key").chmod(0o600)
    config = tmp_path / "push.toml"
    for wrong in ('kind = "webhook"\nurl = "http://example.com"', 'kind = "fax"', 'kind = "webhook"'):
        config.write_text(f'[[sink]]\n{wrong}\nkey_file = "key"\n')
        with pytest.raises(ConfigError):
            load_sinks(config)
    (tmp_path / "key").chmod(0o644)
    config.write_text('[[sink]]\nkind = "stripe"\nkey_file = "key"\n')
    with pytest.raises(ConfigError, match="chmod"):
        load_sinks(config)


def test_the_command_sends_once_and_says_where_it_is(system, ledger, tmp_path, capsys):
    (tmp_path / "key").write_text("k\n")
    (tmp_path / "key").chmod(0o600)
    text = f'[[sink]]\nname = "hook"\nkind = "webhook"\nurl = "{system.url}"\nkey_file = "key"\nunmapped = "name"\n'
    (tmp_path / "push.toml").write_text(text)
    args = ["usage", "push", "--ledger", str(ledger), "--config", str(tmp_path / "push.toml"), "--once", "--json"]
    assert main([*args, "--state", str(tmp_path / "state")]) == 0
    said = json.loads(capsys.readouterr().out)["hook"]
    assert (said["sent"], said["dead"], said["backlog"]) == (5, 0, 0) and list(said["cursors"].values()) == [5]


def test_an_export_says_where_the_next_one_begins_and_writes_nothing_where_it_fails(ledger, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    args = ["usage", "export", "--ledger", str(ledger), "--format", "jsonl", "--output", str(out), "--json"]
    assert main(args) == 0
    said = json.loads(capsys.readouterr().err.splitlines()[-1])
    assert (said["records"], said["cursor"]) == (5, 5) and len(out.read_text().splitlines()) == 5
    assert main([*args, "--after", str(said["cursor"])]) == 0
    assert json.loads(capsys.readouterr().err.splitlines()[-1]) == {
        "records": 0, "cursors": said["cursors"], "cursor": 5,
    }  # fmt: skip
    out.write_text("before")
    segment = next(ledger.glob("usage-*"))
    data = bytearray(segment.read_bytes())
    data[2000] ^= 1
    segment.write_bytes(data)
    assert main(args) == 2 and out.read_text() == "before"
    assert main([*args[:-3], "--json"]) == 2 and capsys.readouterr().out == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ledger", "out.jsonl"]
