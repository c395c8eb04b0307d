"""Every method of every service, found by reflection, is called by every identity, with the access table's result."""

import grpc
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from antefix import rpc
from antefix.errors import PermissionDenied, Unauthenticated
from antefix.security import grants
from antefix.security.access_table import TABLE, GrantRule
from antefix.security.credentials import Credentials
from antefix.security.identity import ISSUED, Identity, Role
from antefix.security.process_security import ProcessSecurity
from tests.waiting import AT_MOST_S

REFUSED = (grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAUTHENTICATED)
OWNER = b"an owner, of 24 bytes   "


async def reflected(channel):
    """Full names of all services' methods, and whether requests and responses are streams."""
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)

    async def ask(**request):
        asked = iter([reflection_pb2.ServerReflectionRequest(**request)])
        return [answer async for answer in stub.ServerReflectionInfo(asked, timeout=AT_MOST_S)][0]  # noqa: RUF015

    listed = await ask(list_services="")
    pool, methods = descriptor_pool.DescriptorPool(), {}
    seen = set()
    for service in listed.list_services_response.service:
        answer = await ask(file_containing_symbol=service.name)
        raws = answer.file_descriptor_response.file_descriptor_proto
        files = {file.name: file for file in map(descriptor_pb2.FileDescriptorProto.FromString, raws)}
        for name in files:
            add_to(pool, files, name, seen)
        for method in pool.FindServiceByName(service.name).methods:
            proto = descriptor_pb2.MethodDescriptorProto()
            method.CopyToProto(proto)
            methods[f"/{service.name}/{method.name}"] = (proto.client_streaming, proto.server_streaming)
    return methods


def add_to(pool, files, name, seen):
    """Add a file to the pool after the files that it depends on."""
    if name not in seen:
        seen.add(name)
        for needed in files[name].dependency:
            add_to(pool, files, needed, seen)
        pool.Add(files[name])


async def call(channel, method, kind):
    """Make one call of any kind with empty messages. Returns its status."""
    make = {
        (False, False): channel.unary_unary,
        (False, True): channel.unary_stream,
        (True, False): channel.stream_unary,
        (True, True): channel.stream_stream,
    }[kind](method)
    try:
        answer = make(iter([b""]) if kind[0] else b"", timeout=AT_MOST_S)
        if kind[1]:
            async for _ in answer:
                return grpc.StatusCode.OK
        else:
            await answer
    except grpc.aio.AioRpcError as err:
        # gRPC's own INTERNAL, if the refusal arrives while the client still sends. The server's internal errors have an
        # id.
        if err.code() is grpc.StatusCode.INTERNAL and "internal error " not in err.details():
            return await call(channel, method, kind)
        return err.code()
    return grpc.StatusCode.OK


def expected(method, role, *, granted):
    row = TABLE[method]
    return role in row.roles and (granted or row.grant is not GrantRule.NEEDED)


async def test_every_method_has_a_row_and_every_row_a_method(authority, serve):
    server = await serve(authority.security("kvstore"))
    methods = await reflected(rpc.channel(server.address, credentials=authority.credentials("operator")))
    # Older versions of grpcio-health-checking, which pyproject.toml allows, do not have this method.
    assert set(methods) | {"/grpc.health.v1.Health/List"} == set(TABLE)
    assert set(methods.values()) == {(False, False), (False, True), (True, False), (True, True)}


@pytest.mark.parametrize("granted", [False, True])
async def test_each_certificate_may_call_what_the_table_says(authority, serve, granted):
    server = await serve(authority.security("kvstore"))
    methods = await reflected(rpc.channel(server.address, credentials=authority.credentials("operator")))
    grants.hold(authority.granter().grant([OWNER], bytes(32), ttl_s=60) if granted else b"")
    wrong = []
    for role in ISSUED:
        async with rpc.channel(server.address, credentials=authority.credentials(role)) as channel:
            for method, kind in methods.items():
                code = await call(channel, method, kind)
                if (code not in REFUSED) != expected(method, role, granted=granted):
                    wrong.append((str(role), method, code))
    assert not wrong


async def test_without_tls_the_secret_says_who_is_who(keyring, serve):
    server = await serve(ProcessSecurity(Role.KVSTORE, keyring=keyring))
    callers = {role: Credentials(role, keyring=keyring) for role in ISSUED if role not in (Role.TENANT, Role.FRONTEND)}
    methods = await reflected(rpc.channel(server.address, credentials=callers[Role.OPERATOR]))
    wrong = []
    for role, credentials in [*callers.items(), (Role.LOCAL, None)]:
        async with rpc.channel(server.address, credentials=credentials) as channel:
            for method, kind in methods.items():
                code = await call(channel, method, kind)
                if (code not in REFUSED) != expected(method, role, granted=False):
                    wrong.append((str(role), method, code))
    assert not wrong


async def test_a_token_is_its_tenant_and_nobody_else(authority, serve):
    def tokens(key, method):
        if key != "right":
            raise Unauthenticated("the API key is missing or not known")
        return Identity(role=Role.TENANT, name="acme", tenants=frozenset({"acme"}))

    server = await serve(authority.security("router", tokens=tokens), token_address="127.0.0.1:0")
    address = server.token_address
    methods = await reflected(rpc.channel(server.address, credentials=authority.credentials("operator")))
    bare = grpc.ssl_channel_credentials((authority.ca / "ca.crt").read_bytes())
    for token, role in (("right", Role.TENANT), ("wrong", Role.NOBODY), ("", Role.NOBODY)):
        async with grpc.aio.secure_channel(address, bare) as raw:
            channel = WithToken(raw, token)
            for method, kind in methods.items():
                code = await call(channel, method, kind)
                assert (code not in REFUSED) == expected(method, role, granted=False), (token, method, code)


class WithToken:
    def __init__(self, channel, token):
        self.channel, self.metadata = channel, (("authorization", f"Bearer {token}"),) if token else ()

    def __getattr__(self, kind):
        def make(method):
            over = getattr(self.channel, kind)(method)
            return lambda request, timeout: over(request, timeout=timeout, metadata=self.metadata)

        return make


async def test_a_method_without_a_row_is_nobodys(authority, serve, monkeypatch):
    server = await serve(authority.security("kvstore"))
    method = "/antefix.v1.KvStoreService/Stats"
    async with rpc.channel(server.address, credentials=authority.credentials("operator")) as channel:
        assert await call(channel, method, (False, False)) not in REFUSED
        monkeypatch.delitem(TABLE, method)
        assert await call(channel, method, (False, False)) in REFUSED


async def test_refusals_are_counted_and_named(authority, serve, caplog):
    security = authority.security("kvstore")
    server = await serve(security)
    method = "/antefix.v1.KvStoreService/Watch"
    async with rpc.channel(server.address, credentials=authority.credentials("prefill", "p7")) as channel:
        with pytest.raises(PermissionDenied, match="prefill p7 may not call"), rpc.rpc_errors():
            async for _ in channel.unary_stream(method)(b"", timeout=AT_MOST_S):
                pass
    (family,) = security.guard.metrics()
    assert [(s.labels, s.value) for s in family.samples if s.value] == [({"method": method, "reason": "table"}, 1.0)]
    assert "prefill p7" in caplog.text


async def test_where_tenants_have_keys_a_process_of_this_host_shows_one_too(keyring, serve):
    def tokens(key, method):
        return Identity(role=Role.TENANT, name="acme", tenants=frozenset({"acme"})) if key == "right" else None

    security = ProcessSecurity(Role.ROUTER, keyring=keyring, tokens=tokens, needs_token=lambda: True)
    server = await serve(security)
    generate, health = "/antefix.v1.RouterService/Generate", "/grpc.health.v1.Health/Check"
    async with grpc.aio.insecure_channel(server.address) as channel:
        assert await call(channel, generate, (False, True)) is grpc.StatusCode.UNAUTHENTICATED
        assert await call(WithToken(channel, "right"), generate, (False, True)) not in REFUSED
        assert await call(channel, health, (False, False)) is grpc.StatusCode.OK


async def test_an_application_shows_its_key_to_the_router_that_it_means(authority, serve, tmp_path):
    """The application has only the CA's certificate. The router's certificate must be for the called host."""
    seen = []

    def tokens(key, method):
        seen.append(key)
        return Identity(role=Role.TENANT, name="acme", tenants=frozenset({"acme"}))

    (tmp_path / "ca.crt").write_bytes((authority.ca / "ca.crt").read_bytes())
    acme = Credentials.of_application(tmp_path, api_key="acme's key")
    generate = "/antefix.v1.RouterService/Generate"
    router = await serve(authority.security("router", tokens=tokens), token_address="localhost:0")
    async with rpc.channel(router.token_address, of=Role.ROUTER, credentials=acme) as channel:
        assert await call(channel, generate, (False, True)) not in REFUSED
    assert seen == ["acme's key"]
    # A server with another host's worker certificate of the same CA does not get the key.
    authority.files("prefill", "elsewhere", hosts=["w1.example"])
    rogue = await serve(authority.security("prefill", "elsewhere", tokens=tokens), token_address="localhost:0")
    async with rpc.channel(rogue.token_address, of=Role.ROUTER, credentials=acme) as channel:
        assert await call(channel, generate, (False, True)) is grpc.StatusCode.UNAVAILABLE
    assert seen == ["acme's key"]
