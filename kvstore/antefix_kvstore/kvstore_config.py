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
# Segments are small enough that dropping one frees only a small part of the budget. The smaller they are, the more
# often a whole segment is dead and nothing is copied (docs/results/store.md, "Eviction and compaction"). But a record
# must fit a segment, so small stores have fewer and larger ones.
SEGMENTS_PER_BUDGET = 64
SEGMENTS_PER_SMALL_BUDGET = 32
SEGMENT_BYTES_OF_SMALL_BUDGETS = 8 * MIB
BUDGET_BYTES_MIN = MIB


@dataclass(frozen=True, slots=True, kw_only=True)
class KvStoreConfig(ObjectUploadConfig):
    """All sizes are hard limits. The defaults suit one machine."""

    dir: str = setting(
        "antefix-store", "directory of the store; a new store is made if the directory is missing or empty"
    )
    address: str = setting("127.0.0.1:0", "host:port, [IPv6]:port or unix:PATH to listen on; port 0: a free one")
    credentials: str = credentials_setting()
    budget_bytes: int = setting(64 * GIB, "disk space that segments and index may take together", unit="bytes")
    free_bytes_min: int = setting(
        0, "bytes to leave free on the store's file system; 0: a sixteenth of it, at most 256 MiB", unit="bytes"
    )
    segment_bytes: int = setting(
        0,
        "size at which a segment is closed; 0: budget / 64, at most 256 MiB (small stores: / 32, at most 8 MiB)",
        unit="bytes",
    )
    tenant_quota_bytes: int = setting(0, "disk space that one tenant may take; 0 for no limit", unit="bytes")
    quotas: tuple[str, ...] = setting(
        (),
        "quotas of single tenants that differ from tenant_quota_bytes, as tenant=size, separated by commas;"
        " names of tenants need secret_file, else write digest:HEX=size",
    )
    secret_file: str = setting(
        "",
        "file with the deployment's secret; without TLS, callers prove with it that they belong to the deployment."
        " quotas and keys_file need it to know tenants by name",
        guards=True,
    )
    block_ttl_s: float = setting(72 * 3600.0, "how long a block stays after its last use; 0 for ever", unit="s")
    checkpoint_ttl_s: float = setting(
        6 * 3600.0, "how long a checkpoint on disk stays after its last use; 0 for ever", unit="s"
    )
    handoff_ttl_s: float = setting(300.0, "how long a handoff waits in memory for its decode worker", unit="s")
    handoff_bytes_max: int = setting(1 * GIB, "memory that handoffs may take", unit="bytes")
    compression: str = setting(
        "auto", "compression of payloads: off, zstd (kept where smaller) or auto (measure disk and codec, then choose)"
    )
    keys_file: str = setting(
        "", "JSON file of tenants' 256-bit keys; when given, everything stored is encrypted", guards=True
    )
    encrypt_key_file: str = setting(
        "",
        "file with one key (64 hex digits) from which each tenant's key is derived; everything stored is then"
        " encrypted",
        guards=True,
    )
    usage_log_dir: str = setting(
        "", "directory of the log of blocks that were stored and read here, to check bills against; empty: none"
    )
    events_redis: str = setting("", "redis:// URL where routers read the store's events; empty: routers ask the store")
    events_name: str = setting(
        "", "address by which routers know this store (their store_address); empty: the address that it listens on"
    )
    events_key_file: str = setting(
        "",
        "file with the key that signs events in Redis (`antefix secret events-key`), if there is no secret_file",
        guards=True,
    )
    lease_redis: str = setting("", "redis:// URL where this store keeps a lease, by which workers and routers find it")
    name: str = setting("", "name of this store for all processes, in receipts and metrics; lease_redis needs a name")
    advertise: str = setting("", "host, or host:port, at which others reach this store; empty: the address above")
    redis_password_file: str = redis_password_setting()
    redis_ca_file: str = redis_ca_setting()
    durable: bool = setting(True, "sync before acknowledging a put; off trades the newest blocks for speed")
    batch_bytes_max: int = setting(64 * MIB, "most payload bytes in one group commit", unit="bytes")
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
            "--events-redis needs --events-key-file (or --secret-file): routers trust only signed events",
        )
        if self.lease_redis:
            check_redis_url(self.lease_redis, "lease_redis")
            is_named = SERVICE_NAME.fullmatch(self.name) is not None
            require(is_named, f"--lease-redis needs --name: lower-case letters, digits, dots, dashes; is {self.name!r}")
            require(
                bool(self.events_key_file or self.secret_file),
                "--lease-redis needs --events-key-file (or --secret-file): only signed leases are trusted",
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
        small = min(SEGMENT_BYTES_OF_SMALL_BUDGETS, self.budget_bytes // SEGMENTS_PER_SMALL_BUDGET)
        usual = min(256 * MIB, self.budget_bytes // SEGMENTS_PER_BUDGET)
        return self.segment_bytes or max(64 << 10, small, usual)

    @property
    def record_bytes_max(self) -> int:
        """Size limit of a record. A larger segment would not fit the reserve in which compaction works."""
        return min(PAYLOAD_BYTES_MAX, self.segment_bytes_in_force - (8 << 10))

    def ttl_s(self, kind: RecordKind) -> float:
        return {
            RecordKind.BLOCK: self.block_ttl_s,
            RecordKind.CHECKPOINT: self.checkpoint_ttl_s,
            RecordKind.HANDOFF: self.handoff_ttl_s,
            RecordKind.POOLED: self.handoff_ttl_s,
        }[kind]
