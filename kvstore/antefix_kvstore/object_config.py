"""Settings for a store service's uploads to the object tier (docs/OBJECT_STORE.md)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from antefix.byte_size import parse_byte_size
from antefix.config import require, setting
from antefix.errors import ConfigError
from antefix.record import RecordKind
from antefix.store.object_access import check_object_store

_DAY_S: Final = 86_400.0
POLICIES: Final = ("reused", "pinned", "evicting", "all")


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectUploadConfig:
    """Part of `KvStoreConfig`. Settings that concern the whole tier must be the same on all hosts that share a
    bucket.
    """

    object_store: str = setting(
        "", "object store behind this store: s3://BUCKET/PREFIX, gs://, az:// or file:///PATH; empty: none"
    )
    object_upload: tuple[str, ...] = setting(
        ("reused", "pinned", "evicting"),
        "which records are uploaded: reused, pinned, evicting (about to be evicted) or all; separated by commas",
    )
    object_reused_after_s: float = setting(
        30.0, "how long a record must have been stored before a read of it counts as reuse", unit="s"
    )
    object_upload_bytes_per_s: int = setting(64 << 20, "how fast uploads may go, on average", unit="bytes")
    object_segment_bytes: int = setting(32 << 20, "payload bytes that are uploaded as one object", unit="bytes")
    object_wait_s: float = setting(
        10.0, "how long records that are to be uploaded wait for others, so that an object is full", unit="s"
    )
    object_budget_bytes: int = setting(
        0, "most bytes in the whole object tier; above that the oldest are deleted first; 0 for no limit", unit="bytes"
    )
    object_tenant_quota_bytes: int = setting(
        0,
        "most bytes of one tenant in the object tier; above that the tenant's oldest are deleted first; 0 for no limit",
        unit="bytes",
    )
    object_quotas: tuple[str, ...] = setting(
        (), "quotas of single tenants that differ from object_tenant_quota_bytes, written as in quotas"
    )
    object_block_ttl_s: float = setting(
        14 * _DAY_S,
        "how long a block stays in the object tier after its upload; reuse uploads the block again; 0 for ever",
        unit="s",
    )
    object_checkpoint_ttl_s: float = setting(
        _DAY_S, "how long a checkpoint stays in the object tier after its upload; 0 for ever", unit="s"
    )
    object_encrypt_key_file: str = setting(
        "",
        "file with one key (64 hex digits) from which each tenant's key is derived; everything in the object tier is"
        " then encrypted",
        guards=True,
    )
    object_keys_file: str = setting(
        "",
        "JSON file of tenants' 256-bit keys for the object tier; records of a tenant without a key are not uploaded",
        guards=True,
    )

    @property
    def object_ttl_s(self) -> dict[RecordKind, float]:
        return {RecordKind.BLOCK: self.object_block_ttl_s, RecordKind.CHECKPOINT: self.object_checkpoint_ttl_s}

    @property
    def object_own_quotas(self) -> dict[str, int]:
        """Quota in bytes by tenant, parsed from the setting."""
        return dict(parse_quota(text) for text in self.object_quotas)


def check_object_upload(config: ObjectUploadConfig) -> None:
    """Raises:  ConfigError: a setting is malformed, or given without an object store."""
    if not config.object_store:
        return
    check_object_store(config.object_store, config.object_encrypt_key_file, config.object_keys_file)
    unknown = sorted(set(config.object_upload) - set(POLICIES))
    require(not unknown, f"object_upload takes {', '.join(POLICIES)}, not {', '.join(unknown)}")
    for name in ("object_reused_after_s", "object_wait_s", "object_block_ttl_s", "object_checkpoint_ttl_s"):
        require(getattr(config, name) >= 0, f"{name} must not be negative, is {getattr(config, name)}")
    for name in ("object_budget_bytes", "object_tenant_quota_bytes"):
        require(getattr(config, name) >= 0, f"{name} must not be negative, is {getattr(config, name)}")
    require(
        config.object_upload_bytes_per_s >= 1 << 10,
        f"object_upload_bytes_per_s must be at least 1 KiB, is {config.object_upload_bytes_per_s}",
    )
    require(
        4 << 10 <= config.object_segment_bytes <= 1 << 30,
        f"object_segment_bytes must be between 4 KiB and 1 GiB, is {config.object_segment_bytes}",
    )
    for text in config.object_quotas:
        parse_quota(text)


def parse_quota(text: str) -> tuple[str, int]:
    """Raises:  ConfigError: the text is not of the form tenant=size."""
    tenant, equals, size = text.rpartition("=")
    require(bool(equals), f"quotas must be tenant=size, is {text!r}")
    try:
        return tenant, parse_byte_size(size)
    except ConfigError as err:
        raise ConfigError(f"quotas must be tenant=size, is {text!r}: {err}") from err
