"""Choosing how to reach a store: straight from its files on the same host, or over gRPC only."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from antefix.store.client import LocalStore, RemoteStore
from antefix.store_files.seal import Seals


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreAddress:
    """Where the kvstore service listens, and its directory if that is on this host ("" if not)."""

    address: str
    directory: str = ""


def open_store(where: StoreAddress | str, *, seals: Seals | None = None) -> LocalStore | RemoteStore:
    """A client of a store service; it connects when first used, and again after the service came back.

    where: a StoreAddress, or "host:port" alone to reach everything over gRPC.  seals: of the deployment; with them only
    sealed records are taken, as every worker must.
    """
    if isinstance(where, str):
        return RemoteStore(where, seals=seals)
    if where.directory:
        return LocalStore(Path(where.directory), where.address, seals=seals)
    return RemoteStore(where.address, seals=seals)
