"""A tenant's share travels from the tenants file to the workers, which divide their time by it."""

import hashlib

import numpy as np
import pytest

from antefix.clients import DecodeClient, PrefillClient
from antefix.errors import ConfigError
from antefix.generation_request import Caller, GenerationRequest
from antefix.sampling import Sampling
from antefix.v1 import prefill_pb2
from antefix_billing.tenants import load_tenants
from tests.gateway.scripted import Script, make_front


def book_of(tmp_path, share):
    (path := tmp_path / "tenants.toml").write_text(
        f'[[tenant]]\nname = "acme"\nshare = {share}\n'
        f'api_key_sha256 = ["{hashlib.sha256(b"key").hexdigest()}"]\n[[tenant]]\nname = "*"\nshare = 2\n'
    )
    return load_tenants(path)


@pytest.mark.parametrize("share", ["0", "101", "-1", "1.5", '"2"', "true"])
def test_a_share_is_a_whole_number_from_1_to_100(tmp_path, share):
    with pytest.raises(ConfigError, match="share"):
        book_of(tmp_path, share)


@pytest.mark.parametrize(("tenant", "share"), [("acme", 3), ("other", 2)])
async def test_an_admitted_request_has_its_tenants_share(tmp_path, tenant, share):
    front = make_front(Script(), ledger=None, tenants=book_of(tmp_path, 3))
    asked = GenerationRequest(
        tokens=np.arange(4, dtype=np.uint32), sampling=Sampling(max_tokens=1), caller=Caller(tenant=tenant)
    )
    bill = await front.admit(asked)
    assert bill.generation.request.share == share
    async for _ in front.run(bill, 60.0):
        pass
    await front.close()


class Calls:
    """A stub that keeps the messages that it gets."""

    def __init__(self):
        self.messages = []

    async def Prefill(self, message, **more):
        self.messages.append(message)
        return prefill_pb2.PrefillResponse()

    def Decode(self, message, **more):
        self.messages.append(message)
        return NoOutput()


class NoOutput:
    def __aiter__(self):
        return self

    async def __anext__(self):
        raise StopAsyncIteration

    def cancel(self):
        pass


async def test_both_kinds_of_workers_are_told(monkeypatch):
    request = GenerationRequest(tokens=np.arange(4, dtype=np.uint32), sampling=Sampling(max_tokens=1), share=5)
    stub, prefill, decode = Calls(), PrefillClient("127.0.0.1:1"), DecodeClient("127.0.0.1:1")
    for client in (prefill, decode):
        monkeypatch.setattr(type(client), "_stub", stub)
    await prefill.prefill(request, timeout_s=1.0)
    assert [x async for x in decode.decode(request, request.sampling, handoff=b"", emitted=(), timeout_s=1.0)] == []
    assert [message.share for message in stub.messages] == [5, 5]
    await prefill.close()
    await decode.close()
