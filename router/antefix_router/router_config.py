"""Settings of a router: those of its HTTP server and of its bill, and further ones."""

from __future__ import annotations

from dataclasses import dataclass

from antefix.block import check_arithmetic
from antefix.config import check_choices, require, same_setting, setting
from antefix.discovery.finders import check_finders
from antefix.events.address import check_url
from antefix.redis_access import check_redis_url
from antefix.security.process_security import credentials_setting
from antefix.store.feed_room import BYTES_MAX
from antefix.store.open_store import StoresConfig, check_stores
from antefix.telemetry.settings import (
    check_telemetry,
    log_format_setting,
    log_level_setting,
    metrics_setting,
    trace_share_setting,
    traces_setting,
)
from antefix.worker_settings import WorkerSettings
from antefix_router.gateway.gateway_config import GatewayConfig
from antefix_router.placement.policy import COMPUTE_WEIGHT, POLICIES


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterConfig(GatewayConfig):
    """Settings of a router."""

    address: str = setting("127.0.0.1:0", "host:port, [IPv6]:port or unix:PATH to listen on; port 0: a free one")
    credentials: str = credentials_setting()
    token_address: str = setting(
        "", "with TLS: host:port for gRPC callers that show an API key and no certificate; empty: none"
    )
    model: str = setting("", "model directory: config.json, tokenizer (weights are hashed, never loaded)")
    kv_format: str = same_setting(WorkerSettings, "kv_format")
    namespace: str = same_setting(WorkerSettings, "namespace")
    bounded_windows: int = same_setting(WorkerSettings, "bounded_windows")
    arithmetic: str = setting(
        "", "arithmetic of the workers, by the name that `antefix doctor` prints; empty: the router asks the workers"
    )
    secret_file: str = setting("", "file with the deployment's secret, which block hashes are keyed with", guards=True)
    store_address: str = setting("", "host:port of the kvstore service")
    store_dir: str = setting("", "the store's directory, if the store is on this host; look-ups then need no call")
    stores: tuple[str, ...] = same_setting(StoresConfig, "stores")
    near_stores: tuple[str, ...] = same_setting(StoresConfig, "near_stores")
    object_store: str = same_setting(StoresConfig, "object_store")
    object_encrypt_key_file: str = same_setting(StoresConfig, "object_encrypt_key_file")
    object_keys_file: str = same_setting(StoresConfig, "object_keys_file")
    prefill_tokens_min: int = setting(
        -1,
        "a prompt with at most this many tokens left to compute is left to the decode worker; -1: measured"
        " speeds decide",
        unit="tokens",
    )
    ttft_s_max: float = setting(
        600.0, "refuse a request, with a retry hint, if it would wait longer than this for its first token", unit="s"
    )
    wait_s_max: float = setting(
        2.0,
        "when the queue is long, refuse a tenant's request at once, with a retry hint, if it would wait longer"
        " than this; 0: no limit",
        unit="s",
    )
    store_events: bool = setting(False, "follow the store's events instead of asking the store at every request")
    store_events_bytes: int = setting(
        BYTES_MAX,
        "memory for block names from stores' events, in equal parts per store; if a store has more names than fit,"
        " it is asked about prompts that are not known whole",
        unit="bytes",
    )
    events_redis: str = setting(
        "", "redis:// URL where workers and stores publish events; empty: the router asks each of them"
    )
    policy: str = setting("least_work", "placement: least_work, or round_robin to measure it against")
    compute_weight: float = setting(
        COMPUTE_WEIGHT,
        "least_work without a store: how long to wait in a queue, in tokens, to save computing one token again",
    )
    prefill: tuple[str, ...] = setting(
        (),
        "addresses of prefill workers, separated by commas. dns:HOST:PORT stands for a worker at each address of"
        " that name. A redis:// URL stands for all workers that have a lease there (their --lease-redis)",
    )
    decode: tuple[str, ...] = setting((), "addresses of decode workers, in the form of those of prefill workers")
    leases: bool = setting(False, "start without workers, which register themselves later")
    metrics_address: str = metrics_setting()
    log_level: str = log_level_setting()
    log_format: str = log_format_setting()
    traces: str = traces_setting()
    trace_share: float = trace_share_setting()

    def __post_init__(self) -> None:
        # No zero-argument super(): a slotted dataclass is a new class, and `__class__` would still be the old one.
        GatewayConfig.__post_init__(self)
        check_telemetry(self)
        check_choices(self)
        if self.arithmetic:
            check_arithmetic(self.arithmetic)
        require(bool(self.model), "--model is needed: a directory with config.json and a tokenizer")
        require(bool(self.secret_file), "--secret-file is needed: block hashes are keyed with the secret in it")
        check_stores(self)
        require(self.prefill_tokens_min >= -1, f"prefill_tokens_min must be at least -1, is {self.prefill_tokens_min}")
        require(self.ttft_s_max > 0, f"ttft_s_max must be positive, is {self.ttft_s_max}")
        require(self.wait_s_max >= 0, f"wait_s_max must not be negative, is {self.wait_s_max}")
        check_finders(self.prefill, "prefill")
        check_finders(self.decode, "decode")
        require(self.store_events_bytes > 0, f"store_events_bytes must be positive, is {self.store_events_bytes}")
        check_url(self.events_redis)
        if self.keys_redis:
            check_redis_url(self.keys_redis, "keys_redis")
        require(self.policy in POLICIES, f"policy must be one of {', '.join(POLICIES)}, is {self.policy!r}")
        require(self.compute_weight >= 0, f"compute_weight must not be negative, is {self.compute_weight}")
        require(
            bool(self.decode) or self.leases,
            "--decode or --leases is needed: name workers, or let workers register themselves",
        )
