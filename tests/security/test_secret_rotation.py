"""`antefix secret` changes the deployment's secret with a real store: hits continue, and no old block is lost."""

import json
import stat

import numpy as np
import pytest

from antefix.errors import ConfigError, InvalidRequest
from antefix.events.event_seal import EventKeys
from antefix.secret import Keyring, read_generations
from antefix_billing.ledger import Ledger
from antefix_billing.ratecard import RateCards
from antefix_billing.tenants import TenantBook
from antefix_console.cli import main
from antefix_console.commands.secret import dropped, rotated
from antefix_router.accounting import Accounts
from antefix_router.gateway.signatures import Signatures
from antefix_router.open_bill import Served
from tests.billing.test_accounting import ask
from tests.gateway.scripted import Script, make_front
from tests.prefill.test_names_of_tenants import WHOLE, hit, run, service, worker

pytestmark = pytest.mark.slow

__all__ = ["service", "worker"]


def step(*args):
    assert main(["secret", *map(str, args)]) == 0


async def test_a_rotation_in_steps_keeps_every_hit_and_then_drops_the_old_secret(worker, tmp_path):
    path = tmp_path / "secret"
    step("create", path)
    old = Keyring.from_file(path)
    cold = await run(worker(old), "acme")
    assert await hit(worker(old), "acme") == WHOLE
    # 1. All roles can read with the new secret before any role writes with it. Roles that have not restarted still
    # work.
    step("rotate", path, "--stage")
    staged = Keyring.from_file(path)
    assert (staged.generation, staged.generations) == (1, (1, 2))
    assert await hit(worker(staged), "acme") == WHOLE
    # 2. Roles write with the new secret. Each reads the other's blocks, before and after its restart.
    step("rotate", path)
    both = Keyring.from_file(path)
    assert (both.generation, both.generations) == (2, (2, 1))
    rotated = await run(worker(both), "acme")
    assert rotated.report.hit_tokens == WHOLE
    assert np.array_equal(rotated.logits, cold.logits)
    assert await hit(worker(both), "beta") == 0
    assert await hit(worker(staged), "beta") == WHOLE
    # 3. Used blocks were written again under the new secret, so removing the old secret loses none of them.
    step("drop", path, 1)
    after = Keyring.from_file(path)
    assert after.generations == (2,)
    again = await run(worker(after), "acme")
    assert again.report.hit_tokens == WHOLE
    assert np.array_equal(again.logits, cold.logits)


async def test_a_stolen_secret_that_is_dropped_at_once_reads_and_forges_nothing(worker, tmp_path):
    path = tmp_path / "secret"
    step("create", path)
    stolen = Keyring.from_file(path)
    step("rotate", path)
    step("drop", path, 1)
    engine = worker(Keyring.from_file(path))
    await run(engine, "acme")
    # A thief with the old secret finds no blocks, and writes only under names that no role looks up.
    assert await hit(worker(stolen), "acme") == 0
    assert await hit(worker(Keyring.from_file(path)), "acme") == WHOLE
    assert engine.seals.num_broken == 0


def test_steps_of_a_rotation_that_make_no_sense_change_nothing(tmp_path, capsys):
    path = tmp_path / "secret"
    assert main(["secret", "rotate", str(path)]) == 2
    step("create", path)
    before = path.read_text()
    for args in (["drop", "1"], ["drop", "7"]):
        assert main(["secret", args[0], str(path), *args[1:]]) == 2
    assert path.read_text() == before
    step("rotate", path, "--stage")
    assert main(["secret", "rotate", str(path), "--stage"]) == 2
    assert "staged" in capsys.readouterr().err
    with pytest.raises(InvalidRequest, match="end at"):
        rotated([(65_535, b"s" * 32)])
    with pytest.raises(InvalidRequest, match="written with"):
        dropped([(2, b"s" * 32), (1, b"t" * 32)], 2)


def test_no_command_shows_a_secret_and_the_file_stays_its_owners(tmp_path, capsys, open_umask):
    path = tmp_path / "secret"
    step("create", path)
    step("rotate", path)
    step("show", path)
    shown = capsys.readouterr()
    step("show", path, "--json")
    rows = json.loads(capsys.readouterr().out)["generations"]
    assert [(row["generation"], row["use"]) for row in rows] == [(2, "write and read"), (1, "read")]
    for _, secret in read_generations(path):
        assert secret.hex() not in shown.out + shown.err
        assert secret.hex()[:16] not in shown.out + shown.err
    assert {stat.S_IMODE(each.stat().st_mode) for each in tmp_path.iterdir()} == {0o600}


@pytest.mark.parametrize("mode", [0o644, 0o604, 0o602])
def test_a_secret_that_everybody_can_read_stops_the_start_and_is_not_in_the_message(mode, tmp_path):
    path = tmp_path / "secret"
    step("create", path)
    path.chmod(mode)
    with pytest.raises(ConfigError, match="chmod 600") as caught:
        Keyring.from_file(path)
    assert path.read_text().strip() not in str(caught.value)
    path.chmod(0o640)  # a group gives the secret to a service that runs as another user
    Keyring.from_file(path)


@pytest.mark.parametrize("line", ["1 {}zz", "x {}", "1 2 {}", "{}\n{}", "0 {}"])
def test_a_broken_secret_file_is_refused_without_being_told(line, tmp_path):
    secret = "5ec7e7" * 11
    (tmp_path / "secret").write_text(line.format(secret, secret))
    with pytest.raises(ConfigError) as caught:
        Keyring.from_file(tmp_path / "secret")
    assert "5ec7e7" not in str(caught.value)


def test_events_are_signed_with_a_key_that_gives_no_secret_away(tmp_path, capsys):
    path = tmp_path / "secret"
    step("create", path)
    step("rotate", path)
    capsys.readouterr()
    step("events-key", path)
    key = tmp_path / "events.key"
    key.write_text(capsys.readouterr().out)
    for _, secret in read_generations(path):
        assert secret.hex() not in key.read_text()
    fields = {"a": "worker", "e": b"epoch", "n": 1, "k": 1, "b": b"12345678", "s": 5}
    signed = EventKeys.from_file(key).sign("stream", fields, epoch=b"epoch")
    raw = {name.encode(): value if isinstance(value, bytes) else str(value).encode() for name, value in signed.items()}
    assert EventKeys.of(Keyring.from_file(path)).holds("stream", raw)
    assert not EventKeys.of(Keyring.from_file(path)).holds("another", raw)


def test_thinking_that_the_older_secret_signed_or_sealed_is_still_known():
    old, new = Keyring(b"o" * 32), Keyring(b"n" * 32, generation=2, older={1: b"o" * 32})
    before, after = Signatures(old, "acme"), Signatures(new, "acme")
    assert after.is_ours("thought", before.sign("thought"))
    assert after.open(before.seal("thought")) == "thought"
    assert not before.is_ours("thought", after.sign("thought"))
    assert before.open(after.seal("thought")) is None
    assert not Signatures(new, "other").is_ours("thought", before.sign("thought"))
    assert Signatures(new, "other").open(before.seal("thought")) is None
    for text in ("", "AA==", "\ud800", "é", "A" * 100):
        assert after.open(text) is None
        assert not after.is_ours("thought", text)


async def test_a_retry_finds_its_bill_after_the_secret_has_changed(tmp_path):
    """The retry's digest is keyed. Without the older secret it would be refused as a different request."""
    front = make_front(Script(), ledger=tmp_path / "ledger")
    await ask(front, "r1")
    await front.close()
    accounts = Accounts(
        Ledger(tmp_path / "ledger"),
        served=Served(model="m", revision="test", fingerprint="00"),
        keyring=Keyring(b"n" * 32, generation=2, older={1: b"0" * 16}),
        cards=RateCards(),
        tenants=TenantBook(),
    )
    front.accounts = accounts
    bill, _ = await ask(front, "r1")
    assert bill.settled is not None
    with pytest.raises(InvalidRequest, match="another request"):
        await ask(front, "r1", tokens=np.arange(1, 9, dtype=np.uint32))
    await front.close()
