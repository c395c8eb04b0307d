"""Fixtures for tests of the engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from antefix_kvstore.kvstore_config import KvStoreConfig
from antefix_kvstore.storage_engine import StorageEngine
from tests.kvstore.small_store import Clock


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def open_engine(tmp_path: Path, clock: Clock) -> Iterator[Callable[..., StorageEngine]]:
    """Opens a store in tmp_path; closes what the test left open."""
    opened: list[StorageEngine] = []

    def opener(**settings: object) -> StorageEngine:
        config = KvStoreConfig(**{"dir": str(tmp_path / "store"), "budget_bytes": 4 << 20, **settings})  # type: ignore[arg-type]
        opened.append(StorageEngine(config, clock_ms=clock))
        return opened[-1]

    yield opener
    for engine in opened:
        if engine.is_open:
            engine.close()
