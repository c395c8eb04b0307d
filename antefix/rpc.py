"""gRPC for every service: server start and graceful stop, health, reflection, errors to statuses and back.

A servicer raises exceptions of `antefix.errors`; `ErrorInterceptor` turns them into statuses, `from_rpc_error` turns
those back on the caller's side. Only the interceptor catches Exception.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import json
import logging
import os
import resource
import secrets
import signal
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import grpc
from google.protobuf.descriptor import FileDescriptor
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_reflection.v1alpha import reflection

from antefix import errors
from antefix.about_service import AboutServicer
from antefix.config import GRACE_S
from antefix.end_tasks import end_tasks
from antefix.keep_running import keep_running
from antefix.request_limits import readable, reading
from antefix.security.caller_limits import CallerLimits
from antefix.security.channels import ReloadingChannel
from antefix.security.credentials import Credentials
from antefix.security.guard import Guard, admitted
from antefix.security.identity import Role
from antefix.security.idle_connections import watch_connections
from antefix.security.listening import UNIX, bare_host, check_calling, join_address, parse_address
from antefix.security.own_credentials import credentials_for
from antefix.security.process_security import OPEN, ProcessSecurity
from antefix.telemetry.context import incoming
from antefix.telemetry.tracing import serving
from antefix.v1 import about_pb2, about_pb2_grpc

if TYPE_CHECKING:
    Context = grpc.aio.ServicerContext[Any, Any]
else:
    Context = grpc.aio.ServicerContext

log = logging.getLogger("antefix.rpc")

# A 1M-token prompt is 4 MB of token ids, the largest thing a unary call carries; payloads go in 1 MiB pieces.
MESSAGE_BYTES_MAX = 16 << 20
# Client and server agree on keepalive: a client that pings more often than the server allows is cut off.
KEEPALIVE_S = 30
_CONNECTIONS_MAX = 16_384
_LAST_WORD_S = 0.1
# Time after the grace period to send the errors that end running calls, and to write their records.
ENDING_S = 5.0

CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
    ("grpc.keepalive_time_ms", KEEPALIVE_S * 1000),
    ("grpc.keepalive_permit_without_calls", 1),
    # Reconnect to a restarted peer within half a second. By default gRPC backs off for up to two minutes.
    ("grpc.max_reconnect_backoff_ms", 500),
    ("grpc.initial_reconnect_backoff_ms", 100),
    # An HTTP proxy from the environment is for the Internet: it cannot reach this host's loopback addresses and
    # sockets.
    ("grpc.enable_http_proxy", 0),
)
SERVER_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
    ("grpc.http2.min_ping_interval_without_data_ms", KEEPALIVE_S * 500),
    ("grpc.keepalive_permit_without_calls", 1),
    # Two servers on one port would each get half of the calls; a port in use must be an error.
    ("grpc.so_reuseport", 0),
    # The calls of a client that hangs, or whose host is gone, end within a minute.
    ("grpc.keepalive_time_ms", KEEPALIVE_S * 1000),
    ("grpc.keepalive_timeout_ms", 20_000),
    # The limit per connection. A router sends all calls to a worker over one; the workers' own limits are far lower.
    ("grpc.max_concurrent_streams", 1024),
    # Close a connection whose client does not complete the handshake. Idle clients reconnect when they have a call.
    ("grpc.server_handshake_timeout_ms", 10_000),
    ("grpc.max_connection_idle_ms", 120_000),
    # Close old connections, because they would never follow a change of addresses or certificates. Running calls get an
    # hour to finish.
    ("grpc.max_connection_age_ms", 12 * 3_600_000),
    ("grpc.max_connection_age_grace_ms", 3_600_000),
)

# Most specific first. The class name is sent with the status, so that the caller raises the same class.
_STATUS: tuple[tuple[type[errors.AntefixError], grpc.StatusCode], ...] = (
    (errors.InvalidRequest, grpc.StatusCode.INVALID_ARGUMENT),
    (errors.Unauthenticated, grpc.StatusCode.UNAUTHENTICATED),
    (errors.PermissionDenied, grpc.StatusCode.PERMISSION_DENIED),
    (errors.FingerprintMismatch, grpc.StatusCode.FAILED_PRECONDITION),
    (errors.ResourceExhausted, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (errors.Conflict, grpc.StatusCode.ALREADY_EXISTS),
    (errors.Unavailable, grpc.StatusCode.UNAVAILABLE),
    (errors.DeadlineExceeded, grpc.StatusCode.DEADLINE_EXCEEDED),
    (errors.BlockCorrupt, grpc.StatusCode.DATA_LOSS),
)
_BY_CODE: dict[grpc.StatusCode, type[errors.AntefixError]] = {code: kind for kind, code in reversed(_STATUS)}
_BY_NAME: dict[str, type[errors.AntefixError]] = {
    name: kind for name, kind in vars(errors).items() if inspect.isclass(kind) and issubclass(kind, errors.AntefixError)
}
_ERROR_KEY = "antefix-error"
_RETRY_KEY = "antefix-retry-after-ms"
_INTERNAL = ((_ERROR_KEY, errors.InternalError.__name__),)


def status_of(err: errors.AntefixError) -> tuple[grpc.StatusCode, tuple[tuple[str, str], ...]]:
    """The status code and trailing metadata that stand for an error that is not a bug of ours."""
    metadata: list[tuple[str, str]] = [(_ERROR_KEY, type(err).__name__)]
    if isinstance(err, errors.ResourceExhausted) and err.retry_after_s is not None:
        metadata.append((_RETRY_KEY, str(round(err.retry_after_s * 1000))))
    for kind, code in _STATUS:
        if isinstance(err, kind):
            return code, tuple(metadata)
    return grpc.StatusCode.INTERNAL, tuple(metadata)


def from_rpc_error(err: grpc.aio.AioRpcError) -> errors.AntefixError:
    """The exception that the called service raised. For a status that gRPC itself made, the closest exception."""
    # dict() would fail: the mapping of grpcio 1.78 iterates over pairs instead of keys.
    metadata = {str(key): value for key, value in err.trailing_metadata() or ()}
    kind = _BY_NAME.get(str(metadata.get(_ERROR_KEY, "")))
    if kind is None:
        # INTERNAL without a class name comes from gRPC itself and means a broken connection.
        kind = _BY_CODE.get(err.code(), errors.Unavailable)
    message = err.details() or err.code().name
    if kind is errors.DeadlineExceeded and _ERROR_KEY not in metadata:
        # gRPC's own words ("Deadline Exceeded", "Stream removed") do not say whose time ran out.
        message = "the time allowed for this call was over before the answer was complete"
    if kind is errors.Unavailable and _ERROR_KEY not in metadata:
        message = f"the service cannot be reached: {message}"
    if err.code() is grpc.StatusCode.UNIMPLEMENTED:
        message = (
            "the service at that address does not have this call: the address belongs to another role, or another"
            " version runs there"
        )
    if issubclass(kind, errors.ResourceExhausted):
        retry = metadata.get(_RETRY_KEY)
        return kind(message, retry_after_s=float(retry) / 1000 if retry else None)
    return kind(message)


@contextlib.contextmanager
def rpc_errors() -> Any:
    """A context around client calls that turns gRPC's errors into exceptions of `antefix.errors`."""
    try:
        yield
    except grpc.aio.AioRpcError as err:
        raise from_rpc_error(err) from err


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Turns exceptions into statuses. A bug (InternalError, or any exception outside `antefix.errors`) becomes INTERNAL
    with an error id that is also in the log.

    Before anything else, the interceptor asks the guard to admit the call.

    draining: when set, ends calls of methods named Watch..., which would otherwise never end and delay the stop.
    """

    def __init__(self, draining: asyncio.Event, guard: Guard) -> None:
        self._draining = draining
        self._guard = guard
        self.limits = CallerLimits()

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: Any) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        name, enter = handler_call_details.method, self._entered
        if handler.response_streaming:
            make = (
                grpc.stream_stream_rpc_method_handler
                if handler.request_streaming
                else grpc.unary_stream_rpc_method_handler
            )
            behaviour = handler.stream_stream or handler.unary_stream
            is_watch = _short(name).startswith("Watch")
            if is_watch:
                wrapped: Any = _guard_watch(behaviour, name, enter, self._draining)
            else:
                wrapped = _guard_stream(behaviour, name, enter)
        else:
            make = (
                grpc.stream_unary_rpc_method_handler
                if handler.request_streaming
                else grpc.unary_unary_rpc_method_handler
            )
            wrapped = _guard_unary(handler.stream_unary or handler.unary_unary, name, enter)
        return make(
            wrapped,
            # Bytes that are not this message are refused with an InvalidRequest, like any other bad request.
            request_deserializer=reading(handler.request_deserializer),
            response_serializer=handler.response_serializer,
        )

    @contextlib.contextmanager
    def _entered(self, method: str, context: Context) -> Iterator[None]:
        """A context around a call. Raises the guard's errors, and Overloaded if the caller's address has its maximum
        number of calls.
        """
        self._guard.admit(method, context)
        with contextlib.ExitStack() as place:
            try:
                place.enter_context(self.limits.taken(context.peer(), admitted().identity))
            except errors.Overloaded:
                self._guard.refused.labels(method, "address").inc()
                raise
            yield


# Makes the context around a call of a method, which admits the call or raises.
Enter = Callable[[str, Context], contextlib.AbstractContextManager[None]]


def _short(method: str) -> str:
    return method.rpartition("/")[2]


def _guard_unary(
    behaviour: Callable[[Any, Any], Awaitable[Any]], name: str, enter: Enter
) -> Callable[[Any, Any], Awaitable[Any]]:
    async def guarded(request: Any, context: Context) -> Any:
        incoming(context.invocation_metadata())
        try:
            with enter(name, context), serving(_short(name)):
                return await behaviour(readable(request), context)
        except Exception as err:  # noqa: BLE001 - the one place that does
            await _abort(context, err)

    return guarded


def _guard_stream(
    behaviour: Callable[[Any, Any], AsyncIterator[Any]], name: str, enter: Enter
) -> Callable[[Any, Any], AsyncIterator[Any]]:
    async def guarded(request: Any, context: Context) -> AsyncIterator[Any]:
        incoming(context.invocation_metadata())
        try:
            # Close the inner generator at once, not at garbage collection: this stops work for a client that left.
            with enter(name, context), serving(_short(name)):
                async with contextlib.aclosing(behaviour(readable(request), context)) as responses:  # type: ignore[type-var]
                    async for response in responses:
                        yield response
        except Exception as err:  # noqa: BLE001 - the one place that does
            await _abort(context, err)

    return guarded


def _guard_watch(
    behaviour: Callable[[Any, Any], Any], name: str, enter: Enter, draining: asyncio.Event
) -> Callable[[Any, Any], Awaitable[Any]]:
    async def watch(request: Any, context: Context) -> None:
        responses = behaviour(request, context)
        if inspect.isawaitable(responses):
            # gRPC's own health service writes to its context itself.
            await responses
            return
        async with contextlib.aclosing(responses):
            async for response in responses:
                await context.write(response)

    async def until_drained(request: Any, context: Context) -> None:
        tasks = [asyncio.create_task(watch(request, context)), asyncio.create_task(draining.wait())]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if tasks[0].done():
                await tasks[0]
                return
            raise errors.Unavailable("the service is draining")
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    return _guard_unary(until_drained, name, enter)


async def _abort(context: Context, err: Exception) -> None:
    if isinstance(err, (grpc.aio.AbortError, grpc.RpcError)) and not isinstance(err, grpc.aio.AioRpcError):
        raise err
    if isinstance(err, grpc.aio.AioRpcError):
        err = from_rpc_error(err)
    if isinstance(err, errors.Overloaded) and err.hold_s:
        await asyncio.sleep(err.hold_s)
    if isinstance(err, errors.AntefixError) and not isinstance(err, errors.InternalError):
        code, metadata = status_of(err)
        await context.abort(code, str(err), metadata)
    error_id = secrets.token_hex(6)
    log.error("internal error %s", error_id, exc_info=err)
    await context.abort(grpc.StatusCode.INTERNAL, f"internal error {error_id}; the service's log has it", _INTERNAL)


def deadline_s(context: Context, default_s: float) -> float:
    """Seconds left for this call, to be passed on to the calls that it makes."""
    left = context.time_remaining()
    return default_s if left is None else max(0.0, min(left, default_s))


@dataclass(slots=True)
class Server:
    """A started server. `drain` reports NOT_SERVING, lets running calls finish, and then stops the server."""

    server: grpc.aio.Server
    health: HealthServicer
    port: int
    host: str
    draining: asyncio.Event
    token_address: str = ""
    watches: tuple[asyncio.Task[None], ...] = ()

    @property
    def address(self) -> str:
        return join_address(self.host, self.port)

    async def drain(self, grace_s: float = GRACE_S) -> None:
        await self.health.enter_graceful_shutdown()
        # Give clients that watch the health service time to see the change.
        await asyncio.sleep(min(grace_s, _LAST_WORD_S))
        self.draining.set()
        await self.server.stop(grace_s)
        await end_tasks(self.watches)


async def start_server(
    address: str,
    register: Callable[[grpc.aio.Server], None],
    descriptors: Sequence[FileDescriptor],
    *,
    security: ProcessSecurity = OPEN,
    token_address: str = "",
    calls: Sequence[str] = (),
) -> Server:
    """Start a server with health, reflection, `about_service`, and the interceptor for errors and access.

    address: "host:port" or "unix:PATH", port 0 for any free one.  descriptors: the proto files whose services are
    registered.  security: who may call; by default everybody on this host.  token_address: with TLS, a second port for
    callers that show a bearer token instead of a certificate.  calls: addresses of services that this one calls and
    that register with no router.
    Raises:  ConfigError: the port is in use or not permitted, or other hosts could reach it without TLS.
    """
    host, port = parse_address(address)
    security.check_listening(address)
    draining = asyncio.Event()
    interceptor = ErrorInterceptor(draining, security.guard)
    server = grpc.aio.server(interceptors=[interceptor], options=[*SERVER_OPTIONS, _connections_limit()])
    register(server)
    health = HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    about_pb2_grpc.add_AboutServiceServicer_to_server(AboutServicer(security, calls), server)
    files = [*descriptors, about_pb2.DESCRIPTOR]
    names = [service.full_name for file in files for service in file.services_by_name.values()]
    reflection.enable_server_reflection(
        [*names, reflection.SERVICE_NAME, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name], server
    )
    # Anyone who can open a socket file can call, so only its owner may open it.
    with private_files() if host.startswith(UNIX) else contextlib.nullcontext():
        bound = _listen(server, join_address(host, port), security.server_credentials())
    for_tokens = _listen_for_tokens(server, token_address, security) if token_address else ""
    await server.start()
    for name in ("", *names):
        await health.set(name, health_pb2.HealthCheckResponse.SERVING)
    ports = [] if host.startswith(UNIX) else [bound]
    if for_tokens:
        ports.append(parse_address(for_tokens)[1])
    note = partial(security.guard.refused.labels("(connection)", "address").inc)
    return Server(
        server=server,
        health=health,
        port=bound,
        host=host,
        draining=draining,
        token_address=for_tokens,
        watches=tuple(
            keep_running(partial(watch_connections, each, interceptor.limits, note), "the watch of idle connections")
            for each in ports
        ),
    )


def _connections_limit() -> tuple[str, int]:
    """The most connections of one port: half of the file descriptors, which leaves some for other ports and files."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _CONNECTIONS_MAX if soft == resource.RLIM_INFINITY else min(_CONNECTIONS_MAX, soft // 2)
    return "grpc.max_allowed_incoming_connections", max(8, most)


def _listen_for_tokens(server: grpc.aio.Server, address: str, security: ProcessSecurity) -> str:
    credentials = security.server_credentials(mutual=False)
    if credentials is None:
        raise errors.ConfigError(
            "--token-address needs TLS (--credentials); without TLS, callers give their tokens at --address"
        )
    host, port = parse_address(address)
    return join_address(host, _listen(server, join_address(host, port), credentials))


def _listen(server: grpc.aio.Server, address: str, credentials: grpc.ServerCredentials | None) -> int:
    try:
        if credentials is None:
            bound: int = server.add_insecure_port(address)
        else:
            bound = server.add_secure_port(address, credentials)
    except RuntimeError as err:
        raise _port_error(address) from err
    if bound == 0:
        raise _port_error(address)
    return bound


@contextlib.contextmanager
def private_files() -> Any:
    """A context in which new files can be opened only by their owner."""
    before = os.umask(0o177)
    try:
        yield
    finally:
        os.umask(before)


def _port_error(address: str) -> errors.ConfigError:
    why = _not_this_host(address) or "the port is in use or not permitted; choose another, or 0"
    return errors.ConfigError(f"cannot listen on {address}: {why}")


def _not_this_host(address: str) -> str:
    """Why the address's host cannot be listened on, whatever the port; empty: it can."""
    host, _ = parse_address(address)
    if host.startswith(UNIX):
        return ""
    try:
        family, kind, _, _, where = socket.getaddrinfo(bare_host(host), 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.bind(where)
    except OSError as err:
        return f"{host} is no address of this host ({err.strerror})"
    return ""


async def run_until_signal(
    server: Server,
    *,
    role: str,
    stop: Callable[[], Awaitable[None]],
    watch_stdin: bool = False,
    http_address: str = "",
    metrics_address: str = "",
    leave: Callable[[], Awaitable[None]] | None = None,
    grace_s: float = GRACE_S,
    others: Sequence[Callable[[], Awaitable[None]]] = (),
    end: Callable[[], None] | None = None,
) -> None:
    """Announce the address on stdout as one JSON line, serve until SIGTERM or SIGINT, `leave`, drain, then `stop`.

    watch_stdin: stop also when stdin closes, which happens whenever the process that started this one dies. grace_s:
    how long running calls may take after the stop; a second SIGINT ends them at once. others: functions that drain
    further servers at the same time. end: makes calls that still run after `grace_s` end with an error; without this
    function their connections are cut.
    """
    asked, hurried = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()
    # A second SIGTERM does not end calls early: a supervisor sends one to all its processes, and `antefix up` sends
    # another.
    loop.add_signal_handler(signal.SIGTERM, asked.set)
    loop.add_signal_handler(signal.SIGINT, lambda: hurried.set() if asked.is_set() else asked.set())
    # Print this only after the signal handlers are set, because its reader may send a signal at once.
    ready = {"ready": True, "role": role, "address": server.address}
    others_too = {"http_address": http_address, "metrics_address": metrics_address}
    others_too["token_address"] = server.token_address
    print(json.dumps({**ready, **{name: where for name, where in others_too.items() if where}}), flush=True)
    watcher = asyncio.create_task(_watch_stdin(asked)) if watch_stdin else None
    await asked.wait()
    if watcher:
        watcher.cancel()
    log.info("the %s service is stopping; running calls may take %g s more", role, grace_s)
    if leave is not None:
        await leave()
    draining = [asyncio.ensure_future(server.drain(grace_s + ENDING_S if end else grace_s))]
    draining += [asyncio.ensure_future(other()) for other in others]
    await _drained(server, draining, hurried, grace_s, end)
    await stop()
    sys.stdout.flush()


async def _drained(
    server: Server,
    draining: Sequence[asyncio.Future[None]],
    hurried: asyncio.Event,
    grace_s: float,
    end: Callable[[], None] | None,
) -> None:
    drained: asyncio.Future[Any] = asyncio.gather(*draining)
    hurry: asyncio.Future[Any] = asyncio.ensure_future(hurried.wait())
    await asyncio.wait([drained, hurry], timeout=grace_s, return_when=asyncio.FIRST_COMPLETED)
    if not drained.done():
        log.warning("the grace period is over; all calls that are still running are stopped now")
        if end is not None:
            end()
        elif hurry.done():
            await server.server.stop(0)
    hurry.cancel()
    await drained


async def _watch_stdin(asked: asyncio.Event) -> None:
    reader = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    transport, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    try:
        while await reader.read(1024):
            continue
        asked.set()
    finally:
        transport.close()


def channel(
    address: str, *, of: Role | None = None, name: str = "", credentials: Credentials | None = None
) -> grpc.aio.Channel:
    """A channel with Antefix's limits. Each call on this channel still needs its own deadline.

    of, name: the role and process name that the server's certificate must have, where there are certificates.
    credentials: sent with each call; None: those of this process (`antefix.security.own_credentials`).
    Raises:  ConfigError: the address is on another host and there is no TLS.
    """
    shown = credentials or credentials_for(address)
    check_calling(address, has_tls=shown is not None and shown.files is not None)
    if shown is None:
        return grpc.aio.insecure_channel(address, options=list(CHANNEL_OPTIONS))
    return ReloadingChannel(address, shown, CHANNEL_OPTIONS, of=of, name=name)
