"""No words of torch, LMDB or the operating system reach a client: each status and each HTTP body has our own text.

`INSIDE` stands in every exception here, as a path or a value would, and must be in no answer.
"""

import errno
import os
import re

import grpc
import httpx2
import lmdb
import pytest
import torch
from google.protobuf.message_factory import GetMessageClass

from antefix import rpc
from antefix.errors import Unavailable
from antefix.usage import Usage
from antefix.v1 import decode_pb2, kvstore_pb2, prefill_pb2, router_pb2
from antefix_billing.ledger import Ledger
from antefix_billing.progress_slots import ProgressJournal
from antefix_kvstore.index_faults import IndexDamaged
from tests.billing.usage_records import opened
from tests.gateway.scripted import Script, make_front, serving
from tests.kvstore.conftest import clock as clock
from tests.kvstore.conftest import open_engine as open_engine
from tests.kvstore.small_store import FINGERPRINT, Prompt
from tests.waiting import AT_MOST_S

INSIDE = "/srv/inside/segments/000000000001.seg"
WORDS = ("inside", "Errno", "mdb_", "MDB_", "No space left", "Input/output", "CUDA", "size of tensor", "KeyError")
OWN = r"internal error [0-9a-f]{12}; the service's log has it"


def of_torch():
    try:
        torch.zeros(2) + torch.zeros(3)
    except RuntimeError as err:
        return RuntimeError(f"{err}; CUDA error at {INSIDE}")


ERRORS = [
    of_torch(),
    torch.OutOfMemoryError(f"CUDA out of memory in {INSIDE}"),
    lmdb.CorruptedError(f"mdb_get: MDB_CORRUPTED: {INSIDE}"),
    KeyError(INSIDE),
    OSError(errno.EIO, "Input/output error", INSIDE),
    FileNotFoundError(errno.ENOENT, "No such file or directory", INSIDE),
]
KINDS = [type(err).__name__ for err in ERRORS]
SERVICES = {
    "router": router_pb2.DESCRIPTOR.services_by_name["RouterService"],
    "decode": decode_pb2.DESCRIPTOR.services_by_name["DecodeService"],
    "prefill": prefill_pb2.DESCRIPTOR.services_by_name["PrefillService"],
    "kvstore": kvstore_pb2.DESCRIPTOR.services_by_name["KvStoreService"],
}


def says_nothing(text):
    return not [word for word in WORDS if word in text]


def kinds_of(method):
    """Whether the requests and the answers of a method are streams."""
    return ["stream" if is_stream else "unary" for is_stream in (method.client_streaming, method.server_streaming)]


def failing(method, err):
    """A handler of this method that raises."""

    async def once(request, context):
        raise err

    async def stream(request, context):
        raise err
        yield

    does = {"request_deserializer": GetMessageClass(method.input_type).FromString, "response_serializer": bytes}
    asks, answers = kinds_of(method)
    make = getattr(grpc, f"{asks}_{answers}_rpc_method_handler")
    return make(stream if method.server_streaming else once, **does)


async def asked(channel, path, method):
    """The status with which a call ends."""
    request = GetMessageClass(method.input_type)()
    call = getattr(channel, "_".join(kinds_of(method)))(path, request_serializer=type(request).SerializeToString)
    answer = call(iter([request]) if method.client_streaming else request, timeout=AT_MOST_S)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        if method.server_streaming:
            async for _ in answer:
                pass
        else:
            await answer
    return caught.value


@pytest.mark.parametrize("service", SERVICES.values(), ids=SERVICES)
@pytest.mark.parametrize("err", ERRORS, ids=KINDS)
async def test_every_call_of_every_service_answers_with_an_id_alone(service, err, caplog):
    handlers = {method.name: failing(method, err) for method in service.methods}
    assert len(handlers) >= 2

    def register(server):
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service.full_name, handlers),))

    server = await rpc.start_server("127.0.0.1:0", register, [service.file])
    try:
        async with rpc.channel(server.address) as channel:
            for method in service.methods:
                status = await asked(channel, f"/{service.full_name}/{method.name}", method)
                assert status.code() is grpc.StatusCode.INTERNAL, method.name
                assert re.fullmatch(OWN, status.details()), (method.name, status.details())
                trailing = " ".join(str(value) for _, value in status.trailing_metadata() or ())
                assert says_nothing(trailing), (method.name, trailing)
    finally:
        await server.drain(0)
    assert INSIDE in caplog.text


BODIES = {
    "/v1/completions": {"model": "m", "prompt": "a", "max_tokens": 5},
    "/v1/chat/completions": {"model": "m", "messages": [{"role": "user", "content": "a"}], "max_tokens": 5},
    "/v1/messages": {"model": "m", "messages": [{"role": "user", "content": "a"}], "max_tokens": 5},
}


@pytest.mark.parametrize("err", ERRORS[::2], ids=KINDS[::2])
async def test_every_http_body_has_an_id_alone(err, caplog):
    """Before the first token, and in a stream after it."""
    for fail_after in (0, 2):
        script = Script(say=lambda prompt: "a long answer", error=err, fail_after=fail_after)
        async with (
            serving(make_front(script, ledger=None)) as url,
            httpx2.AsyncClient(base_url=url, timeout=AT_MOST_S) as client,
        ):
            for path, body in BODIES.items():
                for is_stream in (False, True):
                    answer = await client.post(path, json={**body, "stream": is_stream})
                    assert answer.status_code == (200 if is_stream and fail_after else 500), (path, answer.text)
                    assert re.search(OWN, answer.text), (path, answer.text)
                    assert says_nothing(answer.text + str(answer.headers)), (path, answer.text)
    assert INSIDE in caplog.text


def raising(err):
    def fail(*_, **__):
        raise err

    return fail


@pytest.mark.parametrize("err", [ERRORS[2], ERRORS[5]], ids=[KINDS[2], KINDS[5]])
def test_a_damaged_index_is_told_in_our_own_words(open_engine, monkeypatch, err):
    engine, prompt = open_engine(), Prompt([7] * 64)
    engine.put(prompt.blocks())
    monkeypatch.setattr(engine.index, "lookup", raising(err))
    with pytest.raises(IndexDamaged) as at_once:
        engine.lookup(prompt.hashes, fingerprint=FINGERPRINT)
    with pytest.raises(IndexDamaged) as later:
        engine.put(prompt.blocks())
    assert says_nothing(f"{at_once.value} {later.value}")


@pytest.mark.parametrize(
    ("err", "full"),
    [
        (OSError(errno.ENOSPC, "No space left on device", INSIDE), "file system"),
        (lmdb.MapFullError(f"mdb_put: MDB_MAP_FULL: {INSIDE}"), "index"),
    ],
    ids=["the disk", "the index"],
)
def test_a_full_disk_refuses_records_in_our_own_words(open_engine, monkeypatch, err, full, caplog):
    engine = open_engine()
    monkeypatch.setattr(engine.segments, "append", raising(err))
    refused = engine.put(Prompt([7] * 64).blocks()).refused
    assert refused and all(says_nothing(str(refusal)) for refusal in refused.values())
    assert all(f"its {full} has no space left" in str(refusal) for refusal in refused.values())
    assert INSIDE in caplog.text


def test_a_ledger_that_cannot_write_says_so_in_our_own_words(tmp_path, monkeypatch, caplog):
    told, disk = [], OSError(errno.EIO, "Input/output error", INSIDE)
    ledger, journal = Ledger(tmp_path / "ledger"), ProgressJournal(tmp_path / "ledger")
    try:
        for target, name in ((os, "fdatasync"), (ledger, "_make_room"), (os, "pwrite")):
            with monkeypatch.context() as patched, pytest.raises(Unavailable) as caught:
                patched.setattr(target, name, raising(disk))
                if name == "pwrite":
                    journal.mark("r1", Usage(prompt_tokens=3))
                ledger.append([opened("r1")])
            told.append(str(caught.value))
        with monkeypatch.context() as patched, pytest.raises(Unavailable):
            # The batch cannot be cut off either, so the ledger takes nothing more.
            for name in ("fdatasync", "ftruncate"):
                patched.setattr(os, name, raising(disk))
            ledger.append([opened("r1")])
        with pytest.raises(Unavailable, match="an earlier fault") as caught:
            ledger.append([opened("r1")])
        told.append(str(caught.value))
    finally:
        journal.close()
        ledger.close()
    assert len(set(told)) == 4 and all(says_nothing(text) for text in told), told
    assert caplog.text.count(INSIDE) >= 4
