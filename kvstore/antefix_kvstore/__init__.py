"""The store service: the engine that writes segments and index, and its gRPC server.

`open` opens a store within this process, without a service:

    async with antefix_kvstore.open("blocks") as store:
        await store.put(records)
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from antefix_kvstore.embedded_store import EmbeddedStore

__all__ = ["open"]


def open(
    directory: Path | str, *, budget_bytes: int | str = "64G", durable: bool = True, compression: str = "auto"
) -> EmbeddedStore:
    """Open or create a store in a directory; one process at a time may have it open. Close it when done.

    budget_bytes: disk space that the store may take, such as 10**9, "20G" or "20GB". It evicts records to stay below
    it.
    durable: whether a put waits until its records are synced to disk.  compression: off, zstd or auto.
    Further settings: `EmbeddedStore(KvStoreConfig(...))`.
    Raises:  ConfigError: not a store, another format version, in use by another process, or a malformed setting.
    """
    from antefix.byte_size import parse_byte_size
    from antefix_kvstore.embedded_store import EmbeddedStore
    from antefix_kvstore.kvstore_config import KvStoreConfig

    budget = parse_byte_size(budget_bytes)
    return EmbeddedStore(
        KvStoreConfig(dir=str(directory), budget_bytes=budget, durable=durable, compression=compression)
    )
