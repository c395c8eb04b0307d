"""Nobody with access to the store, its files or the ledger can forge records that pass as ours."""

import dataclasses
import json

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from antefix.record import RecordKind
from antefix.secret import Keyring
from antefix.store.remote_store import RemoteStore
from antefix.store_files.seal import Seals, sealed_part_of
from antefix_billing.ledger_files import read_settled
from antefix_billing.ledger_format import EntryKind, chain_hash
from antefix_billing.receipt import Signer, check_receipt
from antefix_billing.reconcile import verify_all
from antefix_decode.adopt import take_handoff
from antefix_prefill.leave_handoff import leave_handoff
from antefix_prefill.run_prompt import run_prompt
from antefix_prefill.sealed_records import block_record, handoff_record
from tests.billing.test_accounting import ask
from tests.engines import prompt_of
from tests.gateway.scripted import Script, make_front
from tests.prefill.test_names_of_tenants import OLD, TOKENS, service, worker

__all__ = ["service", "worker"]


@pytest.fixture
def engine(worker):
    return worker(Keyring(OLD))


def forged_blocks(engine):
    """Block 0 of acme's prompt, forged by an attacker who can write to the store and has read all of it."""
    prompt, other = (prompt_of(engine, TOKENS, tenant) for tenant in ("acme", "other"))
    payload = memoryview(bytes(engine.layout.block_bytes))
    right = block_record(engine, prompt, 0, payload)
    theirs = block_record(engine, other, 0, payload)
    second = block_record(engine, prompt, 1, payload)
    stranger = Seals(Keyring(b"x" * 32)).seal(dataclasses.replace(right, generation=0, salt=b"", mac=b""))
    name = {"hash": right.hash, "parent": right.parent, "position": right.position}
    yield "without a seal", dataclasses.replace(right, generation=0, salt=bytes(16), mac=bytes(16))
    yield "sealed by another secret", stranger
    yield "another payload under its seal", dataclasses.replace(right, payload=b"\1" * len(payload))
    yield "another tenant's under its name", dataclasses.replace(theirs, **name)
    yield "another tenant's, said to be ours", dataclasses.replace(theirs, **name, tenant=right.tenant)
    yield "another block of ours", dataclasses.replace(second, **name)
    yield "of a generation that is not known", dataclasses.replace(right, generation=7)


async def test_a_remote_read_checks_hash_fingerprint_tenant_and_mac_of_each_record(service, engine):
    prompt = prompt_of(engine, TOKENS, "acme")
    owner = engine.keyring.owner("acme")
    for number, (what, record) in enumerate(forged_blocks(engine), 1):
        seals = Seals(engine.keyring)
        service.engine.evict([(RecordKind.BLOCK, prompt.chain.hashes[0])])
        assert not service.engine.put([record]).refused, what
        into = [memoryview(bytearray(engine.layout.block_bytes))]
        async with RemoteStore(service.server.address, seals=seals) as store:
            got = await store.get_blocks(
                prompt.chain.hashes[:1], into, fingerprint=engine.fingerprint, tenant=owner
            )  # fmt: skip
        assert (got, seals.num_broken) == (0, 1), what
        # The forgery is reported, so that the right record can replace it, and it is counted.
        assert service.engine.counters.forged == number, what


async def test_a_handoff_is_for_its_prompt_its_tenant_and_its_model_alone(worker, service):
    engine = worker(Keyring(OLD))
    computed = await run_prompt(engine, prompt_of(engine, TOKENS, "acme"))
    name = await leave_handoff(engine, computed)
    try:
        assert await take_handoff(engine, computed.prompt, name) is not None
        longer = np.append(TOKENS, 7)
        changed = TOKENS.copy()
        changed[0] = (changed[0] + 1) % 256
        for replayed in (
            prompt_of(engine, TOKENS, "other"),
            prompt_of(engine, TOKENS, "acme\x1fuser"),
            prompt_of(engine, TOKENS[:-1], "acme"),
            prompt_of(engine, longer, "acme"),
            prompt_of(engine, changed, "acme"),
        ):
            assert await take_handoff(engine, replayed, name) is None
        model = dataclasses.replace(worker(Keyring(OLD)), fingerprint=b"m" * 32)
        assert await take_handoff(model, prompt_of(model, TOKENS, "acme"), name) is None
        stranger = worker(Keyring(b"x" * 32))
        assert await take_handoff(stranger, prompt_of(stranger, TOKENS, "acme"), name) is None
        assert await take_handoff(engine, computed.prompt, b"r" * 32) is None
    finally:
        engine.blocks.release(computed.sequence.block_table)


async def test_a_handoff_that_is_made_up_or_changed_is_not_taken(worker, service):
    engine = worker(Keyring(OLD))
    computed = await run_prompt(engine, prompt_of(engine, TOKENS, "acme"))
    name = await leave_handoff(engine, computed)
    engine.blocks.release(computed.sequence.block_table)
    kept = service.servicer.pool._kept[RecordKind.HANDOFF, name]
    stranger = dataclasses.replace(engine, keyring=Keyring(b"x" * 32))
    for forged in (
        dataclasses.replace(kept, payload=bytes(kept.payload)[:-1] + b"\1"),
        dataclasses.replace(kept, sealed=kept.sealed[:-16] + bytes(16)),
        dataclasses.replace(kept, sealed=sealed_part_of(handoff_record(stranger, computed.prompt, kept.payload))),
    ):
        service.servicer.pool._kept[RecordKind.HANDOFF, name] = forged
        assert await take_handoff(engine, computed.prompt, name) is None


@pytest.fixture
async def settled(tmp_path):
    """A ledger with records, its directory, one receipt and the key that checks it."""
    signer = Signer.create(tmp_path / "receipts.key")
    front = make_front(Script(), ledger=tmp_path / "ledger", signer=signer)
    for number in range(3):
        await ask(front, f"r{number}")
    source = front.accounts.ledger.source
    await front.close()
    records = list(read_settled(tmp_path / "ledger"))
    return tmp_path / "ledger", signer.receipt(records[1], source), signer


def changes(receipt):
    payload = json.loads(receipt["payload"])
    for name, value in (("price", "0"), ("tenant", "other"), ("cache_hit_tokens", payload["prompt_tokens"])):
        yield name, {**receipt, "payload": json.dumps({**payload, name: value})}
    yield "sequence", {**receipt, "sequence": receipt["sequence"] + 1}
    yield "previous_hash", {**receipt, "previous_hash": "00" * 32}
    yield "source", {**receipt, "source": "00" * (len(receipt["source"]) // 2)}
    yield "signature", {**receipt, "signature": "00" * (len(receipt["signature"]) // 2)}


async def test_a_receipt_that_was_changed_or_signed_by_another_key_does_not_hold(settled):
    _, receipt, signer = settled
    assert check_receipt(receipt, signer.public_key).ok
    other = Signer(Ed25519PrivateKey.generate())
    for name, changed in changes(receipt):
        tries = [changed]
        # The attacker also computes the hash again, which needs no key.
        previous = bytes.fromhex(changed["previous_hash"])
        again = chain_hash(previous, changed["sequence"], EntryKind.SETTLE, changed["payload"].encode()).hex()
        tries.append({**changed, "hash": again})
        for each in tries:
            try:
                is_ok = check_receipt(each, signer.public_key).ok
            except Exception as err:
                assert not isinstance(err, AssertionError)
                is_ok = False
            assert not is_ok, name
    assert not check_receipt(receipt, other.public_key).ok


async def test_a_usage_record_that_was_forged_in_the_ledger_breaks_its_chain(settled):
    ledger, _, _ = settled
    assert verify_all([ledger], store_log=None, anchors={}).ok
    (segment,) = ledger.glob("usage-*.ledger")
    raw = segment.read_bytes()
    for old, new in ((b'"output_tokens":3', b'"output_tokens":1'), (b'"prompt_tokens":1', b'"prompt_tokens":2')):
        at = raw.index(old)
        segment.write_bytes(raw[:at] + new + raw[at + len(old) :])
        try:
            is_ok = verify_all([ledger], store_log=None, anchors={}).ok
        except Exception as err:
            assert "orrupt" in type(err).__name__
            is_ok = False
        assert not is_ok
    segment.write_bytes(raw)
    assert verify_all([ledger], store_log=None, anchors={}).ok
