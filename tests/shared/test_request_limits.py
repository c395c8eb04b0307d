"""Each field of each request has a limit in its proto. A value over the limit is refused first, by the field's name."""

import importlib
import math
import pkgutil

import grpc
import pytest
from google.protobuf.descriptor import FieldDescriptor as Field

import antefix.v1
from antefix import rpc
from antefix.errors import InvalidRequest
from antefix.request_limits import check_request, limit_of, reading
from antefix.v1 import kvstore_pb2, kvstore_pb2_grpc, router_pb2
from antefix_kvstore.server import register as register_store
from tests.waiting import AT_MOST_S

SERVICES = {}
for module in pkgutil.iter_modules(antefix.v1.__path__):
    if module.name.endswith("_pb2"):
        file = importlib.import_module(f"antefix.v1.{module.name}").DESCRIPTOR
        SERVICES.update({service.full_name: service for service in file.services_by_name.values()})
METHODS = [f"/{name}/{method.name}" for name, service in sorted(SERVICES.items()) for method in service.methods]
FLOATS = (Field.TYPE_DOUBLE, Field.TYPE_FLOAT)
TEXTS = (Field.TYPE_STRING, Field.TYPE_BYTES)


def request_types():
    return [method.input_type for service in SERVICES.values() for method in service.methods]


def fields_below(descriptor, path=()):
    """Every field of a message and of its nested messages, with the path to it."""
    for field in descriptor.fields:
        yield (*path, field)
        if field.message_type is not None and field not in path:
            yield from fields_below(field.message_type, (*path, field))


PATHS = {
    ".".join([root.name, *(field.name for field in path)]): (root, path)
    for root in request_types()
    for path in fields_below(root)
}
LIMITED = {
    name: (root, path)
    for name, (root, path) in PATHS.items()
    if path[-1].type != Field.TYPE_BOOL and (path[-1].is_repeated or path[-1].message_type is None)
}


def test_there_are_services_to_walk():
    assert len(METHODS) >= 20 and len(LIMITED) >= 100


@pytest.mark.parametrize("name", LIMITED)
def test_each_field_of_a_request_has_a_limit(name):
    field = LIMITED[name][1][-1]
    limit = limit_of(field)
    if field.is_repeated:
        assert limit is not None and limit.items_max
    if field.type in TEXTS:
        assert limit is not None and (limit.bytes or limit.bytes_max)
    elif field.message_type is None and field.enum_type is None:
        assert limit is not None and limit.HasField("max")


def test_no_limit_lets_a_message_through_that_the_transport_refuses():
    for _, path in LIMITED.values():
        limit = limit_of(path[-1])
        assert limit is None or limit.bytes_max <= rpc.MESSAGE_BYTES_MAX


def wrong_values(field):
    """Values that protobuf accepts but the field's limit refuses."""
    limit = limit_of(field)
    if field.is_repeated and limit.items_max <= 70_000:
        one = field.message_type._concrete_class() if field.message_type is not None else 0
        yield [one] * (limit.items_max + 1)
    if field.enum_type is not None:
        yield from (99, -1)
    elif field.type in FLOATS:
        yield from (math.nan, math.inf, -math.inf, 1e30, limit.min - 1 - abs(limit.min))
    elif field.type in TEXTS:
        wrong = "x" if field.type == Field.TYPE_STRING else b"x"
        if limit.bytes:
            yield from (wrong, wrong * (limit.bytes + 1))
        elif limit.bytes_max < rpc.MESSAGE_BYTES_MAX:
            yield wrong * (limit.bytes_max + 1)
        if limit.is_name:
            yield from ("a\0b", "a\nb", "\x7f", "\x9b2J")
    elif field.message_type is None:
        bits = 32 if field.type in (Field.TYPE_UINT32, Field.TYPE_FIXED32) else 64
        if int(limit.max) < 2**bits - 1:
            yield from (int(limit.max) + 1, 2**bits - 1)


def message_with(root, path, value):
    message = at = root._concrete_class()
    for field in path[:-1]:
        at = getattr(at, field.name)
        at = at.add() if field.is_repeated else at
    last = path[-1]
    if not last.is_repeated:
        setattr(at, last.name, value)
    else:
        getattr(at, last.name).extend(value if isinstance(value, list) else [value])
    return message


@pytest.mark.parametrize("name", LIMITED)
def test_what_breaks_a_limit_is_refused_by_name(name):
    root, path = LIMITED[name]
    for value in wrong_values(path[-1]):
        with pytest.raises(InvalidRequest, match=path[-1].name):
            check_request(message_with(root, path, value))


@pytest.mark.parametrize("root", request_types(), ids=lambda root: root.name)
def test_an_empty_request_breaks_no_limit(root):
    empty = root._concrete_class()
    check_request(empty)
    assert reading(type(empty).FromString)(b"") == empty


class Taking(kvstore_pb2_grpc.KvStoreServiceServicer):
    """Accepts a put and does nothing."""

    async def Put(self, request_iterator, context):
        async for _ in request_iterator:
            pass
        return kvstore_pb2.PutResponse()


@pytest.fixture
async def server():
    """All services, without methods of their own. A request that is not refused gets UNIMPLEMENTED or INTERNAL."""

    def register(target):
        register_store(Taking(), target)
        for name in SERVICES:
            if name.endswith(("AboutService", "KvStoreService")):
                continue  # every server has the first
            module = importlib.import_module(f"antefix.v1.{SERVICES[name].file.name.split('/')[-1][:-6]}_pb2_grpc")
            short = SERVICES[name].name
            getattr(module, f"add_{short}Servicer_to_server")(getattr(module, f"{short}Servicer")(), target)

    started = await rpc.start_server("127.0.0.1:0", register, [])
    yield started
    await started.drain(0)


@pytest.mark.parametrize("raw", [b"\xff", b"\x0a\xff\xff\xff\xff\x0f", b"\x0a\x02\xff\xfe", b"\x08"], ids=repr)
async def test_malformed_messages_are_invalid_and_nothing_is_logged(server, caplog, raw):
    async with rpc.channel(server.address) as channel:
        for path in METHODS:
            descriptor = SERVICES[path.split("/")[1]].methods_by_name[path.split("/")[2]]
            if raw == b"\x0a\x02\xff\xfe" and not _reads_text_first(descriptor.input_type):
                continue
            call = channel.stream_unary(path) if descriptor.client_streaming else channel.unary_stream(path)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                if descriptor.client_streaming:
                    await call(iter([raw]), timeout=AT_MOST_S)
                else:
                    async for _ in call(raw, timeout=AT_MOST_S):
                        pass
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT, (path, caught.value.details())
    assert not [record for record in caplog.records if record.levelname in ("ERROR", "WARNING")]


def _reads_text_first(descriptor):
    first = descriptor.fields_by_number.get(1)
    return first is not None and first.type == Field.TYPE_STRING


async def test_a_number_out_of_its_range_is_refused_over_the_wire(server):
    stub = kvstore_pb2_grpc.KvStoreServiceStub(rpc.channel(server.address))
    for call, request in (
        (stub.Touch, kvstore_pb2.TouchRequest(hits=2**63)),
        (stub.Pin, kvstore_pb2.PinRequest(duration_s=math.inf)),
        (stub.Pin, kvstore_pb2.PinRequest(duration_s=1e17)),
        (stub.Evict, kvstore_pb2.EvictRequest(records=[kvstore_pb2.RecordName(hash=b"")] * 70_000)),
    ):
        with pytest.raises(InvalidRequest), rpc.rpc_errors():
            await call(request, timeout=AT_MOST_S)

    async def pieces():
        yield kvstore_pb2.PutRequest(header=kvstore_pb2.RecordHeader(cost_s=math.nan))

    with pytest.raises(InvalidRequest, match=r"header\.cost_s"), rpc.rpc_errors():
        await stub.Put(pieces(), timeout=AT_MOST_S)


@pytest.mark.parametrize("variable", ["http_proxy", "https_proxy", "grpc_proxy", "all_proxy"])
async def test_a_proxy_of_the_environment_is_not_asked_for_our_own_calls(server, monkeypatch, variable):
    monkeypatch.setenv(variable, "http://127.0.0.1:1")
    async with rpc.channel(server.address) as channel:
        call = channel.unary_unary("/antefix.v1.RouterService/RouterStatus")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(router_pb2.RouterStatusRequest().SerializeToString(), timeout=AT_MOST_S)
    assert caught.value.code() is not grpc.StatusCode.UNAVAILABLE
