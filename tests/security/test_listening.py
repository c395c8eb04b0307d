"""Which addresses a service may listen on. Host names, IPv6 and Unix sockets work wherever an address does."""

import pytest

from antefix import rpc
from antefix.errors import ConfigError
from antefix.security.channels import ReloadingChannel
from antefix.security.credentials import Credentials
from antefix.security.identity import Role
from antefix.security.listening import advertised, check_listening, is_loopback, names_host, parse_address
from antefix.security.process_security import OPEN
from antefix.store.payload_channel import PayloadChannel
from tests.waiting import AT_MOST_S


@pytest.mark.parametrize(
    "address", ["127.0.0.1:0", "127.8.9.1:7000", "[::1]:7000", "localhost:1", "unix:/run/antefix/router.sock"]
)
def test_this_host_alone_may_be_listened_on_without_tls(address):
    check_listening(address, has_tls=False)
    assert is_loopback(parse_address(address)[0])


@pytest.mark.parametrize(
    "address", ["0.0.0.0:1", "8.8.8.8:1", "[::]:7000", "[2001:db8::1]:1", "no.such.host.invalid:1"]
)
def test_what_others_reach_needs_tls_and_the_error_says_what_to_do(address):
    with pytest.raises(ConfigError, match=r"without TLS only loopback .*--credentials DIR") as caught:
        check_listening(address, has_tls=False)
    assert "\n" not in str(caught.value)
    check_listening(address, has_tls=True)


@pytest.mark.parametrize(
    "address",
    [
        "nonsense",
        "127.0.0.1",
        "127.0.0.1:x",
        "127.0.0.1:70000",
        ":7000",
        "::1:7000",
        "[::1]",
        "[zz]:1",
        "a b:1",
        "unix:",
        "h:²",
        "127.1:0",
        "0177.0.0.1:0",
        "2130706433:0",
        "0x7f000001:0",
        "256.0.0.1:0",
        "a..b:0",
        ".example:0",
        f"{'a' * 64}.example:0",
    ],
)
def test_what_is_no_address_is_refused(address):
    with pytest.raises(ConfigError):
        parse_address(address)


@pytest.mark.parametrize("host", ["192.0.2.1", "[2001:db8::1]", "no.such.host.invalid"])
def test_an_address_of_another_host_is_not_called_a_port_in_use(host):
    assert f"{host} is no address of this host" in str(rpc._port_error(f"{host}:0"))
    assert "the port is in use or not permitted" in str(rpc._port_error("127.0.0.1:1"))


def test_an_address_is_taken_apart():
    assert parse_address("worker1.example:7002") == ("worker1.example", 7002)
    assert parse_address("_worker-1.example.:7002") == ("_worker-1.example.", 7002)
    assert parse_address("bücher.example:7002") == ("bücher.example", 7002)
    assert parse_address(f"{'a' * 63}.example:7002")[1] == 7002
    assert parse_address("[::1]:7002") == ("[::1]", 7002)
    assert parse_address("unix:/tmp/x") == ("unix:/tmp/x", 0)
    assert is_loopback("localhost") and not is_loopback("::")


def test_what_a_worker_tells_routers():
    assert advertised("127.0.0.1:7002", "") == "127.0.0.1:7002"
    assert advertised("0.0.0.0:7002", "worker1.example") == "worker1.example:7002"
    assert advertised("[::]:7002", "[2001:db8::1]") == "[2001:db8::1]:7002"
    assert advertised("0.0.0.0:7002", "gate.example:9000") == "gate.example:9000"
    with pytest.raises(ConfigError, match="--advertise"):
        advertised("[::]:7002", "")


def test_certificates_name_hosts():
    assert names_host("w1.example", "w1.example") and names_host("*.example", "w1.example")
    assert names_host("2001:db8::1", "2001:db8:0::1") and not names_host("*.example", "a.b.example")


@pytest.mark.parametrize("address", ["[::1]:0", "localhost:0", "unix:SOCKET"])
async def test_services_listen_and_are_called_there(serve, authority, tmp_path, address):
    address = address.replace("SOCKET", str(tmp_path / "s"))
    server = await serve(OPEN, address=address)
    await call_health(rpc.channel(server.address))
    if not address.startswith("unix:"):
        tls = await serve(authority.security("prefill"), address=address)
        await call_health(rpc.channel(tls.address, of=Role.PREFILL, credentials=authority.credentials("router")))
    else:
        assert (tmp_path / "s").stat().st_mode & 0o777 == 0o600


async def call_health(channel):
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    async with channel:
        answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=AT_MOST_S)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING


@pytest.mark.parametrize("address", ["10.0.0.5:7001", "[2001:db8::1]:7001", "8.8.8.8:1"])
def test_no_other_host_is_called_unencrypted(address, keyring):
    """Otherwise a key, a proof or a prompt would cross the network unencrypted."""
    for shown in (None, Credentials(Role.PREFILL, keyring=keyring), Credentials.of_application(api_key="k")):
        with pytest.raises(ConfigError, match="with TLS only"):
            rpc.channel(address, credentials=shown)
    with pytest.raises(ConfigError, match="with TLS only"):
        PayloadChannel(address)


@pytest.mark.parametrize("address", ["127.0.0.1:1", "[::1]:1", "localhost:1", "unix:/tmp/s", "no.such.name.invalid:1"])
async def test_this_host_is_called_in_clear(address):
    channel = rpc.channel(address)
    # This is a plain channel of gRPC. Our channels, which prove an identity, need certificates or a secret.
    assert not isinstance(channel, ReloadingChannel)
    await channel.close()
