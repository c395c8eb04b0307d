"""Choosing how to reach a store: straight from its files on the same host, or over gRPC only."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from antefix.store.api import Store
from antefix.store.client import LocalStore, RemoteStore


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreAddress:
    """Where the kvstore service listens, and its directory if that is on this host ("" if not)."""

    address: str
    directory: str = ""


def open_store(where: StoreAddress) -> Store:
    """A client; it connects when first used, and again after the service came back."""
    if where.directory:
        return LocalStore(Path(where.directory), where.address)
    return RemoteStore(where.address)
