"""Settings of the store service."""

from __future__ import annotations

from dataclasses import dataclass

from antefix.config import grace_setting, require, setting
from antefix.discovery.found import SERVICE_NAME
from antefix.events.address import check_url
from antefix.record import RecordKind
from antefix.redis_access import check_redis_url, redis_ca_setting, redis_password_setting
from antefix.security.process_security import credentials_setting
from antefix.store_files.record_format import PAYLOAD_BYTES_MAX
from antefix.telemetry.settings import (
    check_telemetry,
    log_format_setting,
    log_level_setting,
    metrics_setting,
    trace_share_setting,
    traces_setting,
)
from antefix_kvstore.object_config import ObjectUploadConfig, check_object_upload, parse_quota

MIB = 1 << 20
GIB = 1 << 30
# Segments are small enough that dropping one frees only a small part of the budget.
SEGMENTS_PER_BUDGET = 32
BUDGET_BYTES_MIN = MIB


@dataclass(frozen=True, slots=True, kw_only=True)
class KvStoreConfig(ObjectUploadConfig):
    """All sizes are hard limits. The defaults suit one machine."""

    dir: str = setting("antefix-store", "directory of the store; created if it is missing or empty")
    address: str = setting("127.0.0.1:0", "host:port, [IPv6]:port or unix:PATH to listen on; port 0: a free one")
    credentials: str = credentials_setting()
    budget_bytes: int = setting(64 * GIB, "disk space that segments and index may take together", unit="bytes")
    free_bytes_min: int = setting(
        0, "what is left free on the store's file system; 0: a sixteenth of it, at most 256 MiB", unit="bytes"
    )
    segment_bytes: int = setting(
        0, "size at which a segment is closed; 0 means budget / 32, at most 256 MiB", unit="bytes"
    )
    tenant_quota_bytes: int = setting(0, "disk space that one tenant may take; 0 for no limit", unit="bytes")
    quotas: tuple[str, ...] = setting(
        (), "exceptions from that, as tenant=size, separated by commas; names take secret_file, or digest:HEX=size"
    )
    secret_file: str = setting(
        "",
        "file with the deployment's secret: without TLS it shows who belongs to the deployment; and to know tenants by"
        " name in quotas and keys_file",
        guards=True,
    )
    block_ttl_s: float = setting(72 * 3600.0, "how long a block stays after its last use; 0 for ever", unit="s")
    checkpoint_ttl_s: float = setting(6 * 3600.0, "the same for checkpoints on disk", unit="s")
    handoff_ttl_s: float = setting(300.0, "how long a handoff waits in memory for its decode worker", unit="s")
    handoff_bytes_max: int = setting(1 * GIB, "memory that handoffs may take", unit="bytes")
    compression: str = setting(
        "auto", "off, zstd (keep where it is smaller) or auto (measure disk and codec, then choose)"
    )
    keys_file: str = setting(
        "", "JSON file of tenants' 256-bit keys; when given, everything stored is encrypted", guards=True
    )
    encrypt_key_file: str = setting(
        "",
        "file with one key (64 hex digits) that each tenant's is made of: everything stored is encrypted",
        guards=True,
    )
    usage_log_dir: str = setting(
        "", "log which blocks were stored and read here, to reconcile the bill with; empty: none"
    )
    events_redis: str = setting("", "redis:// URL that routers read the store's events from; empty: they ask the store")
    events_name: str = setting(
        "", "what routers call this store, their store_address; empty: the address it listens on"
    )
    events_key_file: str = setting(
        "",
        "file with the key that signs events in Redis (`antefix secret events-key`), where there is no secret_file",
        guards=True,
    )
    lease_redis: str = setting(
        "", "redis:// URL where this store says that it is there, for workers and routers that look for stores in it"
    )
    name: str = setting("", "what all processes call this store, in receipts and metrics; lease_redis needs it")
    advertise: str = setting("", "host, or host:port, at which others reach this store; empty: the address above")
    redis_password_file: str = redis_password_setting()
    redis_ca_file: str = redis_ca_setting()
    durable: bool = setting(True, "sync before acknowledging a put; off trades the newest blocks for speed")
    batch_bytes_max: int = setting(64 * MIB, "payload bytes that one group commit takes", unit="bytes")
    queue_bytes_max: int = setting(
        256 * MIB, "payload bytes that may wait for the writer before puts are refused", unit="bytes"
    )
    compact_bytes_per_s: int = setting(
        32 * MIB, "how fast background compaction may copy; half as fast while payloads are read", unit="bytes"
    )
    scrub_bytes_per_s: int = setting(8 * MIB, "how fast the scrubber may read; 0 turns it off", unit="bytes")

    grace_s: float = grace_setting()
    metrics_address: str = metrics_setting()
    log_level: str = log_level_setting()
    log_format: str = log_format_setting()
    traces: str = traces_setting()
    trace_share: float = trace_share_setting()

    def __post_init__(self) -> None:
        require(self.budget_bytes >= BUDGET_BYTES_MIN, f"budget_bytes must be at least 1 MiB, is {self.budget_bytes}")
        require(self.free_bytes_min >= 0, f"free_bytes_min must not be negative, is {self.free_bytes_min}")
        require(
            self.segment_bytes == 0 or 64 << 10 <= self.segment_bytes <= self.budget_bytes // 4,
            f"segment_bytes must be 0 or between 64 KiB and a quarter of the budget, is {self.segment_bytes}",
        )
        require(
            self.compression in ("off", "zstd", "auto"),
            f"compression must be off, zstd or auto, is {self.compression!r}",
        )
        for name in ("block_ttl_s", "checkpoint_ttl_s", "handoff_ttl_s"):
            require(getattr(self, name) >= 0, f"{name} must not be negative, is {getattr(self, name)}")
        for text in self.quotas:
            parse_quota(text)
        require(
            not (self.keys_file and self.encrypt_key_file), "--keys-file and --encrypt-key-file: give one of the two"
        )
        check_url(self.events_redis)
        require(
            not self.events_redis or bool(self.events_key_file or self.secret_file),
            "--events-redis needs --events-key-file (or --secret-file): routers believe no event that is not signed",
        )
        if self.lease_redis:
            check_redis_url(self.lease_redis, "lease_redis")
            is_named = SERVICE_NAME.fullmatch(self.name) is not None
            require(is_named, f"--lease-redis needs --name: lower-case letters, digits, dots, dashes; is {self.name!r}")
            require(
                bool(self.events_key_file or self.secret_file),
                "--lease-redis needs --events-key-file (or --secret-file): nobody believes a lease that is not signed",
            )
        require(self.grace_s >= 0, f"grace_s must not be negative, is {self.grace_s}")
        check_object_upload(self)
        check_telemetry(self)

    @property
    def own_quotas(self) -> dict[str, int]:
        """Quota in bytes by tenant, parsed from the setting."""
        return dict(parse_quota(text) for text in self.quotas)

    @property
    def segment_bytes_in_force(self) -> int:
        return self.segment_bytes or max(64 << 10, min(256 * MIB, self.budget_bytes // SEGMENTS_PER_BUDGET))

    @property
    def record_bytes_max(self) -> int:
        """Size limit of a record. A larger one would not fit the reserve in which compaction works."""
        return min(PAYLOAD_BYTES_MAX, self.segment_bytes_in_force - (8 << 10))

    def ttl_s(self, kind: RecordKind) -> float:
        return {
            RecordKind.BLOCK: self.block_ttl_s,
            RecordKind.CHECKPOINT: self.checkpoint_ttl_s,
            RecordKind.HANDOFF: self.handoff_ttl_s,
            RecordKind.POOLED: self.handoff_ttl_s,
        }[kind]
