"""The HTTP server: routes, start and graceful stop. The HTTP server runs in the router's event loop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterable, Iterator
from functools import partial
from typing import Any

import uvicorn
from prometheus_client.core import Metric
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from antefix.errors import AntefixError, ConfigError, PermissionDenied, Unavailable
from antefix.rpc import ENDING_S, private_files
from antefix.security.listening import UNIX, bare_host, is_loopback, join_address, parse_address
from antefix.security.process_security import OPEN, ProcessSecurity
from antefix.security.tls import http_context
from antefix_billing.api_keys import Scope
from antefix_billing.usage_record import request_key
from antefix_router.front import Front
from antefix_router.gateway.access import Access, HttpMeasures
from antefix_router.gateway.anthropic import count_tokens, prepare_messages
from antefix_router.gateway.chat import prepare_chat
from antefix_router.gateway.completions import list_models, prepare_completion
from antefix_router.gateway.connections import Connections, QuietAccepting, accepted_at_once
from antefix_router.gateway.gateway import Door, Gateway
from antefix_router.gateway.gateway_config import GatewayConfig
from antefix_router.gateway.http import Call, Endpoint
from antefix_router.gateway.http_errors import NotFound, Provider, error_response
from antefix_router.gateway.openapi import openapi_route
from antefix_router.gateway.responses import prepare_response
from antefix_router.gateway.strict_http import HttpFaults, strict_protocol
from antefix_router.gateway.trusted_proxies import ClientAddress, TrustedProxies
from antefix_router.gateway.usage_answers import usage_routes
from antefix_router.metrics import connection_metrics, http_metrics

log = logging.getLogger("antefix.gateway")

# How long a client may keep its connection open between turns. This is longer than most clients' own limit, so that
# clients close first.
KEEP_ALIVE_S = 75
# Connections that the kernel holds until they are accepted.
_BACKLOG = 1024

_LIMIT_HEADERS = [
    f"x-ratelimit-{name}-{what}" for name in ("limit", "remaining", "reset") for what in ("requests", "tokens")
]
# The prefixes of answers' ids in the APIs; the request's own id follows.
_ID_PREFIXES = ("chatcmpl-", "cmpl-", "resp_", "msg_")

HEALTH_PATHS = ("/livez", "/readyz", "/healthz")

_PREPARE: dict[str, tuple[Callable[[Gateway, Request], Awaitable[Call]], Provider]] = {
    "/v1/chat/completions": (prepare_chat, Provider.OPENAI),
    "/v1/completions": (prepare_completion, Provider.OPENAI),
    "/v1/responses": (prepare_response, Provider.OPENAI),
    "/v1/messages": (prepare_messages, Provider.ANTHROPIC),
}


def build_app(gateway: Gateway, config: GatewayConfig, measures: HttpMeasures, more: Iterable[Route] = ()) -> Starlette:
    """The ASGI application of the HTTP server. more: further addresses that are not part of an API."""
    routes = [
        Route(
            path,
            Endpoint(
                partial(prepare, gateway),
                provider,
                gateway.generating,
                keep_alive_s=config.http_keep_alive_s,
                limits=gateway.limit_headers,
            ),
            methods=["POST"],
        )
        for path, (prepare, provider) in _PREPARE.items()
    ]
    routes += [
        Route("/v1/messages/count_tokens", partial(count_tokens, gateway), methods=["POST"]),
        Route("/v1/models", partial(list_models, gateway), methods=["GET"]),
        Route("/v1/models/{name:path}", partial(list_models, gateway), methods=["GET"]),
        *common_routes(gateway),
    ]
    return application([*routes, openapi_route(routes), *more], measures, config)


def common_routes(door: Door) -> list[Route]:
    """The addresses that every HTTP server has besides its APIs."""
    return [
        *usage_routes(door),
        Route("/v1/usage/receipts/{request_id:path}", partial(_receipt, door), methods=["GET"]),
        Route("/v1/usage/public_key", partial(_public_key, door), methods=["GET"]),
        Route("/livez", _livez, methods=["GET"]),
        Route("/readyz", partial(_readyz, door), methods=["GET"]),
        Route("/healthz", partial(_readyz, door), methods=["GET"]),
    ]


def application(routes: list[Route], measures: HttpMeasures, config: GatewayConfig) -> Starlette:
    """The ASGI application with the access log, and with errors in the forms of the APIs."""
    middleware = [
        Middleware(ClientAddress, proxies=TrustedProxies(config.http_trusted_proxies, config.http_client_header)),
        Middleware(Access, measures=measures),
    ]
    if config.http_cors_origins:
        middleware.append(Middleware(CORSMiddleware, **_cors(config)))
    return Starlette(routes=routes, middleware=middleware, exception_handlers={HTTPException: _http_error})


def _cors(config: GatewayConfig) -> dict[str, Any]:
    """API keys come in headers and never in cookies, so browsers' credentials are not allowed."""
    return {
        "allow_origins": config.http_cors_origins,
        "allow_methods": ("GET", "POST"),
        "allow_headers": ("*",),
        "expose_headers": ("retry-after", "x-request-id", *_LIMIT_HEADERS),
    }


async def _receipt(gateway: Door, request: Request) -> Response:
    """The receipt of one of the tenant's requests. A caller whose key has the scope `admin` may name another tenant."""
    try:
        holder = gateway.holder(request, Scope.USAGE)
        tenant = request.query_params.get("tenant", holder.tenant)
        if tenant != holder.tenant and Scope.ADMIN not in holder.scopes:
            raise PermissionDenied("receipts of another tenant need an API key with the scope admin")
        front = gateway.books
        if front.accounts.ledger is None or front.signer is None:
            raise Unavailable("this router keeps no ledger")
        request_id = request.path_params["request_id"]
        for name in names_of_id(request_id):
            if (found := await front.accounts.find(request_key(tenant, name))) is not None:
                return JSONResponse(front.signer.receipt(*found))
        raise NotFound(f"there is no record of request {request_id!r}")
    except AntefixError as err:
        return error_response(err, Provider.OPENAI)


def names_of_id(given: str) -> tuple[str, ...]:
    """The ids under which a request may be in the ledger, given the id that its client knows: the same id, or the id
    without an API's prefix.
    """
    return (given, *(given.removeprefix(each) for each in _ID_PREFIXES if given.startswith(each)))


async def _public_key(gateway: Door, request: Request) -> Response:
    signer = gateway.books.signer
    if signer is None:
        return error_response(Unavailable("this router keeps no ledger"), Provider.OPENAI)
    return JSONResponse(
        {"algorithm": "Ed25519", "public_key": signer.public_key.hex(), "older": [key.hex() for key in signer.older]}
    )


async def _livez(request: Request) -> Response:
    """The process answers."""
    return JSONResponse({"status": "ok"})


async def _readyz(door: Door, request: Request) -> Response:
    """Whether a request would be served now."""
    if why := door.why_unready():
        return JSONResponse({"status": "unavailable", "reason": why}, status_code=503, headers={"retry-after": "1"})
    return JSONResponse({"status": "ok"})


async def _http_error(request: Request, err: Exception) -> Response:
    """Answer unknown addresses and methods in the form that the caller's client reads."""
    status = err.status_code if isinstance(err, HTTPException) else 500
    anthropic = "anthropic-version" in request.headers
    response = error_response(
        NotFound(f"there is no {request.method} {request.url.path}"),
        Provider.ANTHROPIC if anthropic else Provider.OPENAI,
    )
    response.status_code = status
    return response


class _Server(uvicorn.Server):
    """Leaves signals to the router. `ready` is set when the server listens."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.ready = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.ready.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class HttpServer:
    """A running HTTP server."""

    def __init__(
        self,
        server: _Server,
        serving: asyncio.Task[None],
        address: str,
        gateway: Door,
        measures: HttpMeasures,
        faults: HttpFaults,
        connections: Connections,
        accepting: QuietAccepting,
    ) -> None:
        self.gateway = gateway
        self.measures = measures
        self.faults = faults
        self.connections = connections
        self.accepting = accepting
        self._server = server
        self._serving = serving
        self.address = address

    def metrics(self) -> Iterable[Metric]:
        yield from http_metrics(self.measures, self.gateway.ignored, self.faults)
        yield from connection_metrics(self.connections, self.accepting)

    async def stop(self) -> None:
        """Accept no more requests, let running ones finish, then stop."""
        self._server.should_exit = True
        await asyncio.gather(self._serving, return_exceptions=True)


MakeRoutes = Callable[[Gateway], Iterable[Route]]


async def start_http(
    front: Front,
    config: GatewayConfig,
    security: ProcessSecurity = OPEN,
    *,
    more: MakeRoutes = lambda gateway: (),
    why_unready: Callable[[], str] = lambda: "",
) -> HttpServer:
    """security: if it has TLS, its certificate is used here too. more: makes addresses that are not part of an API.
    why_unready: returns why a request would not be served; empty if it would be served.

    Raises:  ConfigError: the address cannot be listened on, or the file of model aliases has another format.
    """
    gateway = Gateway(front, config)
    gateway.why_unready = why_unready
    measures = HttpMeasures([*_PREPARE, "/v1/messages/count_tokens", "/v1/models", *HEALTH_PATHS, "/openapi.json"])
    return await serve_door(gateway, build_app(gateway, config, measures, more(gateway)), config, measures, security)


async def serve_door(
    door: Door, app: Starlette, config: GatewayConfig, measures: HttpMeasures, security: ProcessSecurity = OPEN
) -> HttpServer:
    """Raises:  ConfigError: the address cannot be listened on."""
    faults = HttpFaults()
    connections = Connections(
        most=config.http_connections_max,
        per_address=config.http_connections_per_address,
        head_s=config.http_head_timeout_s,
        idle_s=KEEP_ALIVE_S,
        unread_s=config.http_unread_timeout_s,
        trusts=TrustedProxies(config.http_trusted_proxies, config.http_client_header).trusts,
    )
    accepting = QuietAccepting()
    host, port = parse_address(config.http_address)
    security.check_listening(config.http_address, flag="--http-address")
    if not is_loopback(host) and not (config.tenants_file or config.api_keys_file):
        raise ConfigError(
            f"--http-address {config.http_address}: other hosts can reach this address, so say who may call: give"
            ' --api-keys-file or --tenants-file (which may say keys = "none")'
        )
    path = host.removeprefix(UNIX) if host.startswith(UNIX) else ""
    family = socket.AF_UNIX if path else socket.AF_INET6 if ":" in host else socket.AF_INET
    # The protocol number is given because asyncio sets TCP_NODELAY only if it is. Without TCP_NODELAY, each answer
    # waits 40 ms between head and body for the client's delayed acknowledgement.
    listener = socket.socket(family, socket.SOCK_STREAM, 0 if path else socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        with private_files() if path else contextlib.nullcontext():
            listener.bind(path or (bare_host(host), port))
        listener.listen(_BACKLOG)
    except OSError as err:
        listener.close()
        raise ConfigError(f"--http-address {config.http_address}: {err}") from err
    server = _Server(
        uvicorn.Config(
            app,
            # The parser is named, so that neither another installed parser nor uvicorn's environment variables change
            # what is accepted.
            http=strict_protocol(faults, connections),
            ws="none",
            proxy_headers=False,
            lifespan="off",
            access_log=False,
            log_config=None,
            # How many connections are accepted in a row. At the limit of open files, each of them would fail.
            backlog=accepted_at_once(),
            # Requests that do not end with our own error (because a client does not read) are cut off a little later.
            timeout_graceful_shutdown=math.ceil(config.grace_s + ENDING_S),
            timeout_keep_alive=KEEP_ALIVE_S,
            server_header=False,
            ssl_context_factory=_tls_of(security),
        )
    )
    accepting.install(asyncio.get_running_loop())
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    ready = asyncio.create_task(server.ready.wait())
    await asyncio.wait({ready, serving}, return_when=asyncio.FIRST_COMPLETED)
    ready.cancel()
    if serving.done():
        raise ConfigError(f"the HTTP server did not start: {serving.exception()}")
    # asyncio has one setting for two things: how many connections it accepts in a row, and how many the kernel holds
    # meanwhile.
    listener.listen(_BACKLOG)
    port = 0 if path else listener.getsockname()[1]
    return HttpServer(server, serving, join_address(host, port), door, measures, faults, connections, accepting)


def _tls_of(security: ProcessSecurity) -> Callable[..., ssl.SSLContext] | None:
    files = security.files
    return None if files is None else lambda *_: http_context(files)
