"""What `--hicache-storage-backend-extra-config` says to this tier, and what SGLang says of the process it is in."""

from __future__ import annotations

import dataclasses
import importlib.metadata
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

from antefix.errors import ConfigError
from antefix.model_dir import hash_files, weight_files
from antefix_engines.engine_store import StoreSettings

# SGLang's own, which it leaves in the mapping.
_OF_SGLANG: Final = frozenset(("backend_name", "module_path", "class_name", "interface_v1"))
# Sharded over tensor-parallel ranks even where a model's other KV is the same on all of them.
_SHARDED_POOLS: Final = frozenset(("mamba",))
FROM_FILES: Final = "files"


@dataclass(frozen=True, slots=True, kw_only=True)
class HiCacheSettings:
    """store: where it is.  weights_revision: of the checkpoint; "files" hashes the model folder's at the start.

    metrics_address: "host:port" at which Prometheus reads `antefix_engine_*`; empty: nowhere.
    kv_cache_dtype: as given to SGLang, where it is not "auto": two kinds of FP8 have the same pages.
    """

    store: StoreSettings
    weights_revision: str
    namespace: str = "default"
    kv_cache_dtype: str = "auto"
    metrics_address: str = ""

    @classmethod
    def of(cls, storage_config: Any) -> Self:
        """Raises:  ConfigError: an unknown or missing setting, or a store that several processes cannot share."""
        values: Mapping[str, Any] = storage_config.extra_config or {}
        own = {field.name for field in dataclasses.fields(cls)} - {"store"}
        rest = {name: value for name, value in values.items() if name not in own | _OF_SGLANG}
        if not values.get("interface_v1"):
            raise ConfigError("extra config: interface_v1 must be 1, so that SGLang says which pages come before")
        if not values.get("weights_revision"):
            raise ConfigError(
                "extra config: weights_revision is missing: the checkpoint's revision, such as its commit, or"
                f" {FROM_FILES!r} to hash the files of the model's folder"
            )
        store = StoreSettings.from_mapping(rest)
        if not store.is_served and _num_processes(storage_config) > 1:
            raise ConfigError("several ranks cannot open one store: run a kvstore service and give its address")
        mine = {name: str(values[name]) for name in own if name in values}
        if mine["weights_revision"] == FROM_FILES:
            mine["weights_revision"] = _hashed(storage_config.model_name)
        return cls(store=store, **mine)


def shard_of(storage_config: Any, pool: str) -> str:
    """Which part of a pool this process holds; empty where it holds all, as every other one does."""
    config = storage_config
    parts = [("pp", config.pp_rank, config.pp_size), ("cp", config.attn_cp_rank, config.attn_cp_size)]
    parts.append(("dcp", getattr(config, "dcp_rank", 0), getattr(config, "dcp_size", 1)))
    if not config.is_mla_model or pool in _SHARDED_POOLS:
        parts.append(("tp", config.tp_rank, config.tp_size))
    return ",".join(f"{name}{rank}/{size}" for name, rank, size in parts if size > 1)


def arithmetic() -> str:
    """What computed the KV, as far as it is known here."""
    try:
        return f"sglang-{importlib.metadata.version('sglang')}"
    except importlib.metadata.PackageNotFoundError:
        return "sglang-unknown"


def _num_processes(config: Any) -> int:
    return int(config.tp_size) * int(config.pp_size) * int(config.attn_cp_size)


def _hashed(model_name: str | None) -> str:
    folder = Path(model_name or "")
    if not model_name or not folder.is_dir():
        raise ConfigError(f"weights_revision {FROM_FILES!r} needs the model as a folder, is {model_name!r}")
    return hash_files([folder / "config.json", *weight_files(folder)])
