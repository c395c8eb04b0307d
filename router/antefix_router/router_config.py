"""Settings of a router: those of its HTTP server and its bill, and its own."""

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
    arithmetic: str = setting("", "what the workers compute, as `antefix doctor` names it; empty: they are asked")
    secret_file: str = setting("", "file with the deployment's secret, which block hashes are keyed with", guards=True)
    store_address: str = setting("", "host:port of the kvstore service")
    store_dir: str = setting("", "the store's directory, when it is on this host: lookups need no call")
    stores: tuple[str, ...] = same_setting(StoresConfig, "stores")
    near_stores: tuple[str, ...] = same_setting(StoresConfig, "near_stores")
    object_store: str = same_setting(StoresConfig, "object_store")
    object_encrypt_key_file: str = same_setting(StoresConfig, "object_encrypt_key_file")
    object_keys_file: str = same_setting(StoresConfig, "object_keys_file")
    prefill_tokens_min: int = setting(
        -1, "an uncached rest of at most this is left to decode; -1: measured speeds decide", unit="tokens"
    )
    ttft_s_max: float = setting(
        600.0, "refuse, with a retry hint, what would wait longer for its first token", unit="s"
    )
    wait_s_max: float = setting(
        2.0, "refuse at once, with a retry hint, a tenant that would wait longer in a long queue; 0: any", unit="s"
    )
    store_events: bool = setting(False, "follow the store's events instead of asking it at every request")
    store_events_bytes: int = setting(
        BYTES_MAX,
        "memory for the names that stores' events tell, in equal parts; a store that has more is asked for prompts that"
        " are not known whole",
        unit="bytes",
    )
    events_redis: str = setting("", "redis:// URL that workers and store tell events to; empty: each of them is asked")
    policy: str = setting("least_work", "placement: least_work, or round_robin to measure it against")
    compute_weight: float = setting(
        COMPUTE_WEIGHT, "least_work without a store: waiting that computing a token again is worth, in tokens"
    )
    prefill: tuple[str, ...] = setting(
        (),
        "addresses of prefill workers, separated by commas; dns:HOST:PORT stands for one at each address of the name, a"
        " redis:// URL for all that say there that they are there (--lease-redis of workers)",
    )
    decode: tuple[str, ...] = setting((), "the same of decode workers")
    leases: bool = setting(False, "start without workers: they register themselves")
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
        require(bool(self.decode) or self.leases, "--decode or --leases is needed: workers named, or that register")
