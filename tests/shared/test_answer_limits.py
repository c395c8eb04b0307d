"""Answers of other services are checked against limits before use. The caller continues without an invalid answer."""

import math

import grpc
import numpy as np
import pytest
from google.protobuf.descriptor import FieldDescriptor as Field

from antefix import rpc
from antefix.clients import DecodeClient, PrefillClient
from antefix.errors import Unavailable
from antefix.generation_request import Caller, GenerationRequest
from antefix.request_limits import answered
from antefix.sampling import Sampling
from antefix.store.remote_store import RemoteStore
from antefix.v1 import decode_pb2, decode_pb2_grpc, kvstore_pb2, kvstore_pb2_grpc, prefill_pb2, prefill_pb2_grpc
from antefix.wire import tokens_to_wire
from tests.shared.test_request_limits import SERVICES, fields_below
from tests.waiting import AT_MOST_S

FLOATS = (Field.TYPE_DOUBLE, Field.TYPE_FLOAT)
PATHS = {
    ".".join([root.name, *(field.name for field in path)]): (root, path)
    for root in [method.output_type for service in SERVICES.values() for method in service.methods]
    for path in fields_below(root)
}
NUMBERS = {name: found for name, found in PATHS.items() if found[1][-1].type in FLOATS}


def made(root, path, value):
    """A message in which the field at `path` has this value, with all messages on the path to it."""
    message = root._concrete_class()
    at = message
    for field in path[:-1]:
        at = getattr(at, field.name).add() if field.is_repeated else getattr(at, field.name)
        at.SetInParent()
    if path[-1].is_repeated:
        getattr(at, path[-1].name).append(value)
    else:
        setattr(at, path[-1].name, value)
    return message


def test_there_is_something_to_walk():
    assert len(NUMBERS) >= 20


@pytest.mark.parametrize("name", [name for name, (_, path) in NUMBERS.items() if path[-1].name != "value"])
def test_no_number_in_an_answer_is_nan_or_infinite(name):
    root, path = NUMBERS[name]
    assert answered(made(root, path, 1.0)) is not None
    for value in (math.nan, math.inf, -math.inf):
        with pytest.raises(Unavailable, match=rf"cannot be right: {root.name}\..*{path[-1].name}"):
            answered(made(root, path, value))


def test_no_list_in_an_answer_is_without_end():
    answer = kvstore_pb2.LookupResponse(checkpoints=range(1 << 20))
    assert answered(answer) is answer
    answer.checkpoints.append(7)
    with pytest.raises(Unavailable, match=r"LookupResponse\.checkpoints takes 1048576 items, has 1048577"):
        answered(answer)


def test_what_is_no_message_is_as_no_answer():
    with pytest.raises(Unavailable, match="not the message"):
        answered(None)


class Liar(
    prefill_pb2_grpc.PrefillServiceServicer,
    decode_pb2_grpc.DecodeServiceServicer,
    kvstore_pb2_grpc.KvStoreServiceServicer,
):
    answer = None

    async def Prefill(self, request, context):
        return self.answer

    PrefillStatus = Lookup = Prefill

    async def Decode(self, request, context):
        yield self.answer


@pytest.fixture
async def liar():
    servicer = Liar()

    def register(server: grpc.aio.Server):
        prefill_pb2_grpc.add_PrefillServiceServicer_to_server(servicer, server)
        decode_pb2_grpc.add_DecodeServiceServicer_to_server(servicer, server)
        kvstore_pb2_grpc.add_KvStoreServiceServicer_to_server(servicer, server)

    server = await rpc.start_server("127.0.0.1:0", register, [prefill_pb2.DESCRIPTOR])
    servicer.address = server.address
    yield servicer
    await server.drain(0)


REQUEST = GenerationRequest(
    tokens=np.arange(5, dtype=np.uint32), sampling=Sampling(max_tokens=2), caller=Caller(request_id="r")
)


async def test_callers_go_on_without_a_service_whose_answer_cannot_be_right(liar):
    async with PrefillClient(liar.address) as client:
        liar.answer = prefill_pb2.PrefillStatusResponse(prefill_tokens_per_s=math.nan)
        with pytest.raises(Unavailable, match=r"PrefillStatusResponse\.prefill_tokens_per_s must be a finite number"):
            await client.status()
        liar.answer = prefill_pb2.PrefillResponse(restore={"hit_tokens": 4, "miss_tokens": 2})
        with pytest.raises(Unavailable, match="4 tokens hit and 2 missed, of 5"):
            await client.prefill(REQUEST, timeout_s=AT_MOST_S)
    async with DecodeClient(liar.address) as client:
        liar.answer = decode_pb2.DecodeResponse(tokens=tokens_to_wire(np.arange(3, dtype=np.uint32)))
        with pytest.raises(Unavailable, match="more tokens than were asked for"):
            async for _ in client.decode(REQUEST, REQUEST.sampling, handoff=b"", emitted=(), timeout_s=AT_MOST_S):
                pass
    async with RemoteStore(liar.address) as store:
        for answer in ({"num_blocks": 3}, {"num_blocks": 1, "checkpoints": [9]}):
            liar.answer = kvstore_pb2.LookupResponse(**answer)
            with pytest.raises(Unavailable, match="more than the 2 blocks asked for"):
                await store.lookup([b"a" * 32, b"b" * 32], fingerprint=b"f" * 32)
