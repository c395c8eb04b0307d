"""Any name that the HTTP API accepts passes every lower layer, because lower layers' limits are never narrower."""

import asyncio

import httpx2
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from redis.asyncio import Redis

from antefix.errors import InvalidRequest
from antefix.events.redis_stream import StreamPublisher, store_stream
from antefix.generation_request import Caller, GenerationRequest
from antefix.sampling import Sampling
from antefix.secret import Keyring
from antefix.store_files.hit_log import StoreLog, read_store_log
from antefix.store_files.seal import Seals
from antefix.v1 import router_pb2, usage_pb2
from antefix.window_pool import RedisWindowPool
from antefix_billing.api_keys import CONTROL
from antefix_billing.ledger import Ledger
from antefix_billing.receipt import Signer, check_receipt
from antefix_billing.usage_record import Status, request_key
from antefix_kvstore.kvstore_config import KvStoreConfig
from antefix_kvstore.storage_engine import StorageEngine
from antefix_router.front import REQUEST_ID_BYTES_MAX, TENANT_BYTES_MAX, cache_tenant
from antefix_router.gateway.text_check import is_text
from antefix_router.placement.sessions import Sessions
from antefix_router.placement.workers import WorkerRole
from tests.events.sources import EVENT_KEYS
from tests.gateway.scripted import Script, make_front, serving
from tests.kvstore.small_store import BLOCK, FINGERPRINT, Prompt
from tests.waiting import AT_MOST_S

KEYRING = Keyring(b"0" * 16)
TOKENS = list(range(BLOCK * 2))
WIDE = "\U0001f600"


def within(nbytes_max, **kinds):
    return st.text(st.characters(exclude_categories=("Cs",), **kinds), max_size=nbytes_max).filter(
        lambda text: len(text.encode()) <= nbytes_max
    )


names = within(TENANT_BYTES_MAX).filter(lambda text: not CONTROL.search(text))
sessions = within(TENANT_BYTES_MAX)
request_ids = within(REQUEST_ID_BYTES_MAX).filter(bool)


def asked(**names):
    tokens = np.array(TOKENS, np.uint32)
    return GenerationRequest(tokens=tokens, sampling=Sampling(max_tokens=4), caller=Caller(**names))


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(WIDE * 128, WIDE * 128, WIDE * 128, WIDE * 64)  # as many bytes as fit
@example('"' * 512, "\\" * 512, "\x01" * 512, "\x01" * 256)  # most characters when written as JSON
@example("%" * 512, "/" * 512, "{}" * 256, ":" * 256)  # most when quoted, and what separates
@example("é" * 22 + "a", "", "", "r")  # where version 1 of the record ended
@given(names, names, sessions, request_ids)
def test_any_name_goes_through_all_layers(tmp_path_factory, redis, tenant, user, session, request_id):
    directory = tmp_path_factory.mktemp("names")
    asyncio.run(_through_the_bill(directory, tenant, user, session, request_id))
    asyncio.run(_through_the_store(directory, redis.url, cache_tenant(tenant, user)))


async def _through_the_bill(directory, tenant, user, session, request_id):
    script = Script()
    front = make_front(script, ledger=directory / "ledger")
    bill = await front.admit(asked(tenant=tenant, user=user, session=session, request_id=request_id))
    # gRPC carries every accepted name.
    sent = router_pb2.GenerateRequest(tenant=tenant, user=user, session=session, request_id=request_id)
    assert router_pb2.GenerateRequest.FromString(sent.SerializeToString()) == sent
    assert b"".join([bytes(map(int, piece.tokens)) async for piece in front.run(bill, 5.0)]) == b"yes"
    await front.close()
    # The bill has the names unchanged, on disk, in receipts and on the wire.
    ledger = Ledger(directory / "ledger")
    settled = ledger.find(request_key(tenant, request_id))
    record = settled.record
    assert (record.tenant, record.user, record.request_id) == (tenant, user, request_id)
    assert record.status is Status.STOP and not ledger.unsettled()
    signer = Signer.create(directory / "receipts.key")
    assert check_receipt(signer.receipt(settled, ledger.source), signer.public_key, None).ok
    assert usage_pb2.UsageRecord(**record.to_dict()).user == user
    ledger.close()
    # The hint is kept for placement.
    hints = Sessions()
    hints.note(cache_tenant(tenant, user), session, WorkerRole.DECODE, "a:1")
    assert hints.last(cache_tenant(tenant, user), session, WorkerRole.DECODE) == ("a:1" if session else "")


async def _through_the_store(directory, url, tenant):
    engine = StorageEngine(KvStoreConfig(dir=str(directory / "store"), budget_bytes=4 << 20))
    seals, owner, prompt = Seals(KEYRING), KEYRING.owner(tenant), Prompt(TOKENS)
    prompt.chain = type(prompt.chain)(FINGERPRINT, KEYRING.key(tenant), BLOCK)
    prompt.hashes = prompt.chain.extend(TOKENS)
    name, wanted = str(directory), {each[:8] for each in prompt.hashes}
    stream = store_stream(name)
    pool = RedisWindowPool(url, bytes_max=1 << 30, seals=seals)
    log = StoreLog(directory / "log")
    try:
        async with StreamPublisher(url, engine.events, stream, name, keys=EVENT_KEYS):
            assert not engine.put([seals.seal(prompt.block(i, tenant=owner)) for i in range(2)]).refused
            log.stored(prompt.hashes)
            found = engine.lookup(prompt.hashes, fingerprint=FINGERPRINT)
            assert found.num_blocks == 2
            # The part that changes with every session is in Redis too.
            assert await pool.put(seals.seal(prompt.checkpoint(1, tenant=owner)))
            held = await pool.nearest(prompt.hashes[::-1], fingerprint=FINGERPRINT, tenant=owner)
            assert held is not None and (held.index, pool.num_corrupt) == (0, 0)
            async with Redis.from_url(url) as direct:
                told, last = set(), "0"
                while not wanted <= told:
                    entries = await direct.xread({stream: last}, block=20_000)
                    assert entries, "nothing was told"
                    for number, fields in entries[0][1]:
                        last = number
                        packed = fields.get(b"b", b"")
                        told |= {packed[start : start + 8] for start in range(0, len(packed), 8)}
        log.close()
        assert len(list(read_store_log(directory / "log"))) == 2
    finally:
        await pool.close()
        engine.close()


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["tenant", "user", "session", "request_id"]), st.text(st.characters(), min_size=1, max_size=700))
def test_the_door_takes_a_name_or_refuses_it_by_what_it_is_called(field, text):
    """Never anything but an answer or an InvalidRequest, whatever the text is."""
    front = make_front(Script(), ledger=None)
    limit = REQUEST_ID_BYTES_MAX if field == "request_id" else TENANT_BYTES_MAX
    fits = is_text(text) and len(text.encode()) <= limit
    is_shown = field not in ("tenant", "user") or not CONTROL.search(text)

    async def admit():
        return await front.admit(asked(**{field: text}))

    if fits and is_shown:
        bill = asyncio.run(admit())
        assert field == "session" or getattr(bill.opened, field) == text
    else:
        with pytest.raises(InvalidRequest, match=f"^{field} " if not fits else "control"):
            asyncio.run(admit())


async def test_http_takes_as_much_as_the_door_behind_it():
    script = Script()
    async with (
        serving(make_front(script, ledger=None)) as url,
        httpx2.AsyncClient(base_url=url, timeout=AT_MOST_S) as client,
    ):

        async def ask(headers=None, **fields):
            body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], **fields}
            answer = await client.post("/v1/chat/completions", json=body, headers=headers)
            return answer.status_code, answer.text

        assert (await ask(user=WIDE * 128, prompt_cache_key=WIDE * 128))[0] == 200
        assert (await ask(headers={b"idempotency-key": b"\xff" * 128}))[0] == 200
        assert (script.requests[0].cache_tenant, script.requests[0].caller.session) == ("\x1f" + WIDE * 128, WIDE * 128)
        for name, fields in (
            ("user", {"user": WIDE * 128 + "a"}),
            ("session", {"prompt_cache_key": "a" * 513}),
            ("request_id", {"headers": {"idempotency-key": "a" * 257}}),
        ):
            status, text = await ask(**fields)
            assert status == 400 and f"{name} takes" in text
