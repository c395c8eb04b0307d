"""Settings of a router that serves workers of other inference engines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from antefix.config import require, setting
from antefix.errors import ConfigError
from antefix.redis_access import check_redis_url
from antefix.security.listening import is_loopback
from antefix.security.process_security import credentials_setting
from antefix.split_url import is_http_url, split_url
from antefix.telemetry.settings import (
    check_telemetry,
    log_format_setting,
    log_level_setting,
    metrics_setting,
    trace_share_setting,
    traces_setting,
)
from antefix.whole_number import whole_number
from antefix_router.gateway.gateway_config import GatewayConfig
from antefix_router.placement.policy import COMPUTE_WEIGHT, POLICIES

RANKS_MAX: Final = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class EnginePlace:
    """One cache of the fleet: a worker's data-parallel rank.  events, replay: the addresses of its KV events; empty: it
    publishes none.
    """

    url: str
    rank: int | None = None
    events: str = ""
    replay: str = ""
    events_key: str = ""

    @property
    def address(self) -> str:
        """The engine's name in logs, metrics and records."""
        host = self.url.partition("://")[2]
        return host if self.rank is None else f"{host}#{self.rank}"


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetConfig(GatewayConfig):
    """Settings of a fleet's router. A list of addresses has one address per entry of `workers`; a port alone is on the
    worker's host.
    """

    address: str = setting("127.0.0.1:0", "host:port or unix:PATH that operators' commands call; port 0: a free one")
    credentials: str = credentials_setting()
    workers: tuple[str, ...] = setting((), "URLs of workers' OpenAI doors, separated by commas")
    ranks: int = setting(1, "data-parallel ranks of each worker; rank N publishes KV events on a port that is N higher")
    events: tuple[str, ...] = setting(
        (), "where workers publish KV events: one port for all, or an address for each worker"
    )
    replay: tuple[str, ...] = setting(
        (), "where workers replay KV events: one port for all, or an address for each worker"
    )
    events_topic: str = setting("", "beginning of the topics of KV events to read; empty: all topics")
    events_keys: tuple[str, ...] = setting((), "workers' CURVE public keys, if their KV events are encrypted")
    events_key_file: str = setting("", "file with this router's own CURVE key, made if missing")
    plain_network: bool = setting(
        False, "reach workers on other hosts without encryption; vLLM and SGLang cannot encrypt KV events"
    )
    worker_key_file: str = setting("", "file with the API key that workers require")
    secret_file: str = setting(
        "", "file with the secret that names of blocks are keyed with, made if missing", guards=True
    )
    block_size: int = setting(16, "block size of workers that publish no KV events", unit="tokens")
    directory_blocks: int = setting(1 << 22, "most blocks whose workers the router remembers; about 100 bytes each")
    share_caches: bool = setting(False, "let tenants hit each other's prefixes, by sending workers no cache_salt")
    worker_requests_max: int = setting(
        256, "most requests at one worker at once; a request that finds all workers full is refused"
    )
    ttft_s_max: float = setting(
        600.0, "refuse a request, with a retry hint, if it would wait longer than this for its first token", unit="s"
    )
    health_s: float = setting(2.0, "time between health checks of each worker", unit="s")
    policy: str = setting("least_work", "placement: least_work, or round_robin to measure it against")
    compute_weight: float = setting(
        COMPUTE_WEIGHT, "least_work: how long to wait in a queue, in tokens, to save computing one token again"
    )
    metrics_address: str = metrics_setting()
    log_level: str = log_level_setting()
    log_format: str = log_format_setting()
    traces: str = traces_setting()
    trace_share: float = trace_share_setting()

    def __post_init__(self) -> None:
        # No zero-argument super(): a slotted dataclass is a new class, and `__class__` would still be the old one.
        GatewayConfig.__post_init__(self)
        check_telemetry(self)
        require(bool(self.workers), "--workers is needed: URLs of OpenAI doors, such as http://127.0.0.1:8000")
        require(len(set(self.workers)) == len(self.workers), "--workers names one worker twice")
        require(bool(self.http_address), "--http-address is needed: host:port that clients call")
        require(bool(self.secret_file), "--secret-file is needed: names of blocks are keyed with the secret in it")
        require(1 <= self.ranks <= RANKS_MAX, f"ranks must be from 1 to {RANKS_MAX}, is {self.ranks}")
        require(self.block_size > 0, f"block_size must be positive, is {self.block_size}")
        require(self.directory_blocks > 0, f"directory_blocks must be positive, is {self.directory_blocks}")
        require(self.worker_requests_max > 0, f"worker_requests_max must be positive, is {self.worker_requests_max}")
        require(self.ttft_s_max > 0, f"ttft_s_max must be positive, is {self.ttft_s_max}")
        require(self.health_s > 0, f"health_s must be positive, is {self.health_s}")
        require(self.policy in POLICIES, f"policy must be one of {', '.join(POLICIES)}, is {self.policy!r}")
        require(self.compute_weight >= 0, f"compute_weight must not be negative, is {self.compute_weight}")
        require(bool(self.events) or not self.replay, "--replay needs --events")
        require(not self.events_keys or bool(self.events_key_file), "--events-keys needs --events-key-file")
        if self.keys_redis:
            check_redis_url(self.keys_redis, "keys_redis")
        self.places()

    def places(self) -> tuple[EnginePlace, ...]:
        """The caches, one per rank. Raises: ConfigError: an address is invalid, or the engine's events would cross a
        network unencrypted.
        """
        found = []
        for index, worker in enumerate(self.workers):
            url, host = _url(worker, plain=self.plain_network)
            events = _endpoint("events", self.events, index, host, len(self.workers))
            replay = _endpoint("replay", self.replay, index, host, len(self.workers))
            key = _of("events_keys", self.events_keys, index, len(self.workers))
            for name, endpoint in (("events", events), ("replay", replay)):
                if endpoint and not key and not self.plain_network and not _is_local(endpoint):
                    raise ConfigError(_IN_THE_CLEAR.format(f"--{name} {endpoint}"))
            for rank in range(self.ranks):
                found.append(
                    EnginePlace(
                        url=url,
                        rank=rank if self.ranks > 1 else None,
                        events=_of_rank(events, rank),
                        replay=_of_rank(replay, rank),
                        events_key=key,
                    )
                )
        return tuple(found)


_IN_THE_CLEAR: Final = (
    "{} is on another host, and the connection, which carries prompts, is not encrypted. If that network is yours"
    " alone, say --plain-network true"
)


def _url(worker: str, *, plain: bool) -> tuple[str, str]:
    """The URL and its host."""
    parts = split_url(worker, "--workers")
    fits = is_http_url(worker) and parts.port != 0 and not parts.query
    require(fits, f"--workers: {worker!r} is not the URL of an OpenAI door, such as http://127.0.0.1:8000")
    host = parts.hostname or ""
    if parts.scheme == "http" and not plain and not is_loopback(host):
        raise ConfigError(_IN_THE_CLEAR.format(f"--workers {worker}"))
    return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/').removesuffix('/v1')}", host


def _of(name: str, values: tuple[str, ...], index: int, num_workers: int) -> str:
    """The value for this worker: its own value, or the one that holds for all workers."""
    require(len(values) in (0, 1, num_workers), f"--{name.replace('_', '-')} takes one value, or one for each worker")
    return values[index if len(values) == num_workers else 0] if values else ""


def _endpoint(name: str, values: tuple[str, ...], index: int, host: str, num_workers: int) -> str:
    value = _of(name, values, index, num_workers)
    if value.isdigit():
        value = f"tcp://[{host}]:{value}" if ":" in host else f"tcp://{host}:{value}"
    port = value.rpartition(":")[2]
    fits = value.startswith("ipc://") or (value.startswith("tcp://") and bool(whole_number(port, 65535)))
    require(not value or fits, f"--{name} takes a port, tcp://HOST:PORT or ipc://PATH, not {value!r}")
    return value


def _of_rank(endpoint: str, rank: int) -> str:
    """The endpoint of a rank. As in vLLM and SGLang, each rank of a worker uses the next port number."""
    if not rank or not endpoint.startswith("tcp://"):
        return endpoint
    host, _, port = endpoint.rpartition(":")
    return f"{host}:{int(port) + rank}"


def _is_local(endpoint: str) -> bool:
    scheme, _, rest = endpoint.partition("://")
    return scheme == "ipc" or is_loopback(rest.rpartition(":")[0])
