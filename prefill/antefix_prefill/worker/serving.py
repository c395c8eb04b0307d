"""The service code that prefill and decode workers share: settings, starting, registering and serving."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc
from google.protobuf.descriptor import FileDescriptor

from antefix import rpc
from antefix.config import grace_setting, require, same_setting, setting
from antefix.discovery import ServiceLease
from antefix.discovery.finders import called_names
from antefix.events.address import check_url
from antefix.events.event_seal import EventKeys
from antefix.events.redis_stream import StreamPublisher, memory_stream
from antefix.redis_access import RedisAccess, check_redis_url
from antefix.secret import Keyring
from antefix.security.identity import Role
from antefix.security.listening import advertised, is_wildcard, parse_address
from antefix.security.process_security import ProcessSecurity, credentials_setting, open_security
from antefix.store.many_stores import ManyStores
from antefix.store.object_access import object_tiers
from antefix.store.open_store import (
    StoresConfig,
    check_stores,
    local_copies,
    open_stores,
    store_addresses,
    store_sources,
)
from antefix.store_files.record_format import STORE_FILE
from antefix.store_files.seal import Seals
from antefix.telemetry.exposition import Read
from antefix.telemetry.settings import (
    check_telemetry,
    log_format_setting,
    log_level_setting,
    metrics_setting,
    serve_metrics,
    trace_share_setting,
    traces_setting,
)
from antefix.v1 import memory_pb2, window_pb2
from antefix_prefill.worker.engine import Engine, EngineConfig, build_engine
from antefix_prefill.worker.kv_events_service import telling_kv_events
from antefix_prefill.worker.memory_service import add_memory_service
from antefix_prefill.worker.metrics import worker_registry
from antefix_prefill.worker.router_lease import WorkerLease
from antefix_prefill.worker.window_service import add_window_service

log = logging.getLogger("antefix_prefill.worker")


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerConfig(EngineConfig):
    """An engine's settings, and the settings of the service around it."""

    address: str = setting("127.0.0.1:0", "host:port, [IPv6]:port or unix:PATH to listen on; port 0: a free one")
    advertise: str = setting("", "host, or host:port, at which routers reach this worker; empty: the address above")
    credentials: str = credentials_setting()
    store_address: str = setting("", "host:port of the kvstore service")
    store_dir: str = setting(
        "", "the store's directory, if the store is on this host; payloads are then read from its files, without a call"
    )
    stores: tuple[str, ...] = same_setting(StoresConfig, "stores")
    near_stores: tuple[str, ...] = same_setting(StoresConfig, "near_stores")
    local_copies_bytes: int = same_setting(StoresConfig, "local_copies_bytes")
    local_copies_ttl_s: float = same_setting(StoresConfig, "local_copies_ttl_s")
    object_store: str = same_setting(StoresConfig, "object_store")
    object_encrypt_key_file: str = same_setting(StoresConfig, "object_encrypt_key_file")
    object_keys_file: str = same_setting(StoresConfig, "object_keys_file")
    routers: tuple[str, ...] = setting(
        (),
        "routers to register with, separated by commas; dns:HOST:PORT stands for a router at each address of that name",
    )
    lease_redis: str = setting(
        "", "redis:// URL where this worker keeps a lease, by which routers find it; empty: none"
    )
    events_redis: str = setting(
        "", "redis:// URL where routers read this worker's memory events; empty: routers ask the worker"
    )
    kv_events: str = setting(
        "",
        "tcp:// or ipc:// address on which KV events are published in vLLM's format, with token ids; a loopback"
        " address, or encrypted with CURVE; empty: none",
    )
    kv_events_replay: str = setting("", "address on which readers can ask for the last KV events again")
    kv_events_topic: str = setting("", "topic of KV events")
    kv_events_key_file: str = setting("", "file with the CURVE key that KV events are encrypted with, made if missing")
    kv_events_clients: tuple[str, ...] = setting((), "CURVE public keys (Z85) of the clients that may read KV events")
    grace_s: float = grace_setting()
    metrics_address: str = metrics_setting()
    log_level: str = log_level_setting()
    log_format: str = log_format_setting()
    traces: str = traces_setting()
    trace_share: float = trace_share_setting()

    def __post_init__(self) -> None:
        # Not super().__post_init__(): a slotted dataclass is a new class, and `__class__` would be the old one.
        EngineConfig.__post_init__(self)
        check_stores(self)
        require(
            bool(self.advertise) or not is_wildcard(parse_address(self.address)[0]),
            f"nobody can call {self.address}: give --advertise HOST, as routers know this host",
        )
        check_url(self.events_redis)
        if self.lease_redis:
            check_redis_url(self.lease_redis, "lease_redis")
        require(bool(self.kv_events) or not self.kv_events_replay, "--kv-events-replay needs --kv-events")
        require(self.grace_s >= 0, f"grace_s must not be negative, is {self.grace_s}")
        check_telemetry(self)


def secure_worker(config: WorkerConfig, role: Role) -> ProcessSecurity:
    """The identity under which this worker serves from now on. Raises: ConfigError: the worker's credentials cannot be
    used.
    """
    security = open_security(role, config.credentials, keyring=Keyring.from_file(config.secret_file))
    security.use()
    security.check_calling(
        (
            *(where.address for where in store_addresses(config)),
            *called_names(config.routers),
        )
    )
    return security


async def start_engine(config: WorkerConfig, *, may_call: Callable[[str], object] = lambda address: None) -> Engine:
    """The worker's engine over its store. The store is also told how payloads are laid out.

    may_call: as in `open_stores`.
    Raises:  ModelError, ConfigError: the model or a setting is not usable.
    """
    where = store_addresses(config)
    for directory in (each.directory for each in where if each.directory):
        if not (Path(directory) / STORE_FILE).exists():
            # Not an error, because the store may start later. But a misspelt directory must not go unnoticed.
            log.warning(
                "there is no store in --store-dir %s; until a store is made there, every look-up misses", directory
            )
    keyring = Keyring.from_file(config.secret_file)
    seals = Seals(keyring)
    store = open_stores(
        where,
        near=config.near_stores,
        seals=seals,
        more=object_tiers(config, seals=seals, keyring=keyring),
        copies=local_copies(config),
        sources=store_sources(config, EventKeys.of(keyring)),
        may_call=may_call,
    )
    engine = build_engine(config, store, keyring)
    if isinstance(store, ManyStores):
        await store.start()
    await engine.register()
    return engine


async def serve_worker(
    config: WorkerConfig,
    engine: Engine,
    *,
    security: ProcessSecurity,
    add_service: Callable[[grpc.aio.Server], None],
    metrics: Read,
    descriptors: Sequence[FileDescriptor],
    stop: Callable[[], Awaitable[None]],
    watch_stdin: bool,
) -> None:
    """Serve the worker's own service and the services that all workers have, until told to stop. While it serves, the
    worker is registered with the routers.

    metrics: those of the worker's own service, read in the event loop.
    """

    def add_services(server: grpc.aio.Server) -> None:
        add_service(server)
        add_window_service(engine, server)
        add_memory_service(engine.blocks.events, server)

    server = await rpc.start_server(
        config.address,
        add_services,
        [*descriptors, window_pb2.DESCRIPTOR, memory_pb2.DESCRIPTOR],
        security=security,
    )
    role, address = security.role.value, advertised(server.address, config.advertise)
    security.check_calling([address])
    lease = WorkerLease(
        config.routers,
        role=role,
        address=address,
        fingerprint=engine.fingerprint,
        keyring=engine.keyring,
        arithmetic=engine.arithmetic.name,
        setup=engine.arithmetic.setup,
        block_size=engine.block_size,
    )
    registry = worker_registry(role, engine)
    registry.add_in_loop(metrics)
    stream = memory_stream(address)
    events = StreamPublisher(
        RedisAccess.of(config.events_redis, config) if config.events_redis else "",
        engine.blocks.events,
        stream,
        address,
        keys=EventKeys.of(engine.keyring),
    )
    async with lease, events, telling_kv_events(config, engine), _leased(config, engine, security.role, address):
        await rpc.run_until_signal(
            server,
            role=role,
            stop=stop,
            watch_stdin=watch_stdin,
            metrics_address=serve_metrics(config, registry, security),
            leave=lease.end,
            grace_s=config.grace_s,
        )


def _leased(
    config: WorkerConfig, engine: Engine, role: Role, address: str
) -> contextlib.AbstractAsyncContextManager[object]:
    """A context during which Redis holds the worker's lease, if the settings ask for one."""
    if not config.lease_redis:
        return contextlib.nullcontext()
    where = RedisAccess.of(config.lease_redis, config)
    return ServiceLease(where, role=role, name=address, address=address, keys=EventKeys.of(engine.keyring))
