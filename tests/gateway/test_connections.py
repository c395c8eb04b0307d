"""Connections are limited before anything is read. Silent ones make room for others; half-sent requests are closed."""

import asyncio
import contextlib
import logging
import socket
from unittest import mock

import httpx2
import pytest

from antefix.errors import ConfigError
from antefix_router.gateway import app
from antefix_router.gateway.connections import Connections, QuietAccepting
from antefix_router.gateway.gateway_config import GatewayConfig
from antefix_router.gateway.strict_http import HttpFaults, strict_protocol
from tests.gateway.scripted import Script, make_front, serving
from tests.waiting import AT_MOST_S, until

pytestmark = pytest.mark.slow

BODY = {"model": "antefix-tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}


class Conn:
    def __init__(self, address="a"):
        self.address, self.dropped = address, False

    def drop(self):
        self.dropped = True


def connections(most=4, per_address=3, trusted=()):
    return Connections(most=most, per_address=per_address, head_s=1, idle_s=1, trusts=lambda peer: peer in trusted)


def enter(group, conn):
    assert group.enter(conn)
    return conn


def close_dropped(group, *conns):
    for conn in conns:
        if conn.dropped:
            group.leave(conn)


def test_the_connection_that_was_idle_longest_makes_room():
    group = connections(per_address=10)
    first, second, *_ = conns = [enter(group, Conn(address)) for address in "abcd"]
    group.busy(first)
    enter(group, Conn("e"))
    assert second.dropped and not first.dropped
    close_dropped(group, *conns)
    group.idle(first)
    enter(group, Conn("f"))
    assert conns[2].dropped, "it has been idle for longer than the one whose request just ended"
    assert (group.num_refused, group.num_displaced) == (0, 2)


def test_where_all_are_at_work_the_new_one_is_closed():
    group = connections(most=2, per_address=10)
    for address in "ab":
        group.busy(enter(group, Conn(address)))
    assert not group.enter(Conn("c"))
    assert (group.num_refused, len(group)) == (1, 2)


def test_one_address_takes_room_from_itself_only():
    group = connections()
    other = enter(group, Conn("b"))
    own = [enter(group, Conn("a")) for _ in range(3)]
    enter(group, Conn("a"))
    assert own[0].dropped and not other.dropped
    close_dropped(group, *own)
    for conn in own[1:]:
        group.busy(conn)
    group.busy(next(conn for conn in group._idle if conn.address == "a"))
    assert not group.enter(Conn("a"))
    enter(group, Conn("c"))


def test_a_proxy_has_many_behind_it():
    group = connections(most=100, trusted=("proxy",))
    for _ in range(20):
        group.busy(enter(group, Conn("proxy")))
    for _ in range(20):
        group.busy(enter(group, Conn("")))
    assert (len(group), group.num_refused) == (40, 0)


def test_counts_come_back_to_nothing():
    group = connections(most=50, per_address=50)
    conns = [enter(group, Conn(str(number % 7))) for number in range(40)]
    for conn in conns:
        group.leave(conn)
    assert len(group) == 0 and not group._idle and not group._by_address


async def test_a_failing_accept_is_one_line(caplog):
    loop, quiet = asyncio.get_running_loop(), QuietAccepting()
    before = loop.get_exception_handler()
    try:
        quiet.install(loop)
        with caplog.at_level(logging.ERROR):
            for _ in range(2048):
                loop.call_exception_handler(
                    {"message": "socket.accept() out of system resource", "exception": OSError(24, "Too many")}
                )
        assert quiet.num_failed == 2048
        assert len(caplog.records) == 1 and "Too many" in caplog.text and "Traceback" not in caplog.text
        loop.call_exception_handler({"message": "something else"})
        assert len(caplog.records) == 2
    finally:
        loop.set_exception_handler(before)


async def opened(url, num, sent=b""):
    host, port = url.removeprefix("http://").split(":")
    pairs = [await asyncio.open_connection(host, int(port)) for _ in range(num)]
    for _, writer in pairs:
        writer.write(sent)
    return pairs


async def asked(url):
    async with httpx2.AsyncClient(base_url=url, timeout=AT_MOST_S) as client:
        return (await client.post("/v1/chat/completions", json=BODY)).status_code


@contextlib.asynccontextmanager
async def door(**settings):
    async with serving(make_front(Script(), ledger=None), **settings) as url, asyncio.timeout(AT_MOST_S):
        yield url


@pytest.mark.parametrize("sent", [b"", b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\n"])
async def test_idle_and_half_begun_connections_keep_nobody_out(sent):
    async with door(http_connections_max=8, http_connections_per_address=8) as url:
        pairs = await opened(url, 40, sent)
        assert await asked(url) == 200
        for _, writer in pairs:
            writer.close()


async def test_a_head_that_trickles_is_cut_off():
    async with door(http_head_timeout_s=0.5) as url:
        ((reader, writer),) = await opened(url, 1, b"POST /v1/chat/completions HTTP/1.1\r\n")
        is_cut_off = False
        try:
            # The client sends for up to twenty times the limit.
            for number in range(600):
                writer.write(b"x-%d: y\r\n" % number)
                await writer.drain()
                await asyncio.sleep(0.02)
                if is_cut_off := reader.at_eof():
                    break
        except ConnectionError:
            is_cut_off = True
        assert is_cut_off
        assert await asked(url) == 200


async def test_a_second_request_on_a_connection_has_its_own_time():
    """The limit covers neither the first answer nor the pause after it, but it covers an unfinished second head."""
    async with door(http_head_timeout_s=0.8) as url:
        ((reader, writer),) = await opened(url, 1)
        head = b"GET /v1/models HTTP/1.1\r\nhost: x\r\n"
        for _ in range(2):
            writer.write(head + b"\r\n")
            assert b"200 OK" in await reader.readline()
            await asyncio.sleep(1.0)
            await reader.read(65536)
        writer.write(head)
        with contextlib.suppress(ConnectionError):
            assert await reader.read() == b""


async def test_an_answer_that_takes_longer_than_a_head_is_not_cut_off():
    script = Script()
    script.pause_s = 0.6
    async with serving(make_front(script, ledger=None), http_head_timeout_s=0.5) as url:
        assert await asked(url) == 200


def test_the_settings_are_checked():
    for wrong in (
        {"http_head_timeout_s": 0},
        {"http_unread_timeout_s": 0},
        {"http_connections_max": -1},
        {"http_connections_per_address": -5},
    ):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            GatewayConfig(**wrong)


async def unread(url, num):
    """A connection that requests `num` answers and reads none, with the smallest buffer that the kernel allows."""
    host, port = url.removeprefix("http://").split(":")
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    sock.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(sock, (host, int(port)))
    await loop.sock_sendall(sock, b"GET /openapi.json HTTP/1.1\r\nhost: x\r\n\r\n" * num)
    return sock


async def test_a_client_that_reads_nothing_is_let_go_and_its_request_with_it(monkeypatch):
    made, real = [], app.Connections
    monkeypatch.setattr(app, "Connections", lambda **options: made.append(real(**options)) or made[-1])
    async with door(http_unread_timeout_s=0.3) as url:
        before = asyncio.all_tasks()
        # The answers are about 20 MB, and the kernel buffers a few MB of them for the reader.
        sock = await unread(url, 400)
        await until(lambda: made[0].num_unread)
        await until(lambda: not (asyncio.all_tasks() - before or len(made[0])))
        sock.close()
        assert await asked(url) == 200


class Buffer:
    """A transport with given numbers of unread bytes, and an event loop whose timers the test runs."""

    def __init__(self, *sizes):
        self.sizes, self.timers, self.is_aborted = list(sizes), [], False

    def get_write_buffer_size(self):
        return self.sizes.pop(0)

    def abort(self):
        self.is_aborted = True

    def call_later(self, seconds, call, *args):
        self.timers.append((call, args))
        return mock.Mock()


@pytest.mark.parametrize(
    ("sizes", "is_aborted"),
    [((0,), False), ((100, 60, 60, 60), True), ((100, 100), True), ((100, 60, 60, 20, 20, 0, 0), False)],
)
def test_a_client_that_reads_slowly_is_waited_for(sizes, is_aborted):
    buffer, group = Buffer(*sizes), connections()
    protocol = object.__new__(strict_protocol(HttpFaults(), group))
    protocol.transport, protocol.loop, protocol._unread_timer = buffer, buffer, None
    protocol._watch_reader()
    while buffer.timers:
        call, args = buffer.timers.pop()
        call(*args)
    assert (buffer.is_aborted, group.num_unread, buffer.sizes) == (is_aborted, int(is_aborted), [])
