"""The tier's settings in `--hicache-storage-backend-extra-config`, and what SGLang tells of the present process."""

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

# SGLang's own settings, which it leaves in the mapping.
_OF_SGLANG: Final = frozenset(("backend_name", "module_path", "class_name", "interface_v1"))
# Pools that are divided over tensor-parallel ranks even where all ranks have the model's other KV.
_SHARDED_POOLS: Final = frozenset(("mamba",))
FROM_FILES: Final = "files"


@dataclass(frozen=True, slots=True, kw_only=True)
class HiCacheSettings:
    """store: where the store is.  weights_revision: of the model's weights; "files" hashes the model folder at each
    start.

    metrics_address: "host:port" at which Prometheus reads `antefix_engine_*`; empty: not served.
    kv_cache_dtype: the value given to SGLang, if it is not "auto": two kinds of FP8 have pages of the same size.
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
            raise ConfigError(
                "extra config: interface_v1 must be 1, so that SGLang tells which pages come before a page"
            )
        if not values.get("weights_revision"):
            raise ConfigError(
                "extra config: weights_revision is missing; give the checkpoint's revision, such as its "
                f"commit, or {FROM_FILES!r} to hash the files in the model's directory"
            )
        store = StoreSettings.from_mapping(rest)
        if not store.is_served and _num_processes(storage_config) > 1:
            raise ConfigError(
                "several ranks cannot open one store in their own processes: run a kvstore service and give its address"
            )
        mine = {name: str(values[name]) for name in own if name in values}
        if mine["weights_revision"] == FROM_FILES:
            mine["weights_revision"] = _hashed(storage_config.model_name)
        return cls(store=store, **mine)


def shard_of(storage_config: Any, pool: str) -> str:
    """The part of a pool that this process holds; empty if every process holds the whole pool."""
    config = storage_config
    parts = [("pp", config.pp_rank, config.pp_size), ("cp", config.attn_cp_rank, config.attn_cp_size)]
    parts.append(("dcp", getattr(config, "dcp_rank", 0), getattr(config, "dcp_size", 1)))
    if not config.is_mla_model or pool in _SHARDED_POOLS:
        parts.append(("tp", config.tp_rank, config.tp_size))
    return ",".join(f"{name}{rank}/{size}" for name, rank, size in parts if size > 1)


def arithmetic() -> str:
    """A name for the hardware and software that compute the KV, as far as SGLang's configuration tells them."""
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
