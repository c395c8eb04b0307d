"""Sends a worker's KV events in vLLM's format while the worker serves; off by default. Needs the extra `fleet`."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from antefix_prefill.worker.engine import Engine

if TYPE_CHECKING:
    from antefix_prefill.worker.serving import WorkerConfig


@contextlib.asynccontextmanager
async def telling_kv_events(config: WorkerConfig, engine: Engine) -> AsyncIterator[None]:
    """Raises:  ConfigError: the address or a key cannot be used."""
    if not config.kv_events:
        yield
        return
    from antefix.events.kv_publisher import KvPublisher, KvPublisherConfig

    publisher = KvPublisher(
        KvPublisherConfig(
            endpoint=config.kv_events,
            replay=config.kv_events_replay,
            topic=config.kv_events_topic,
            block_size=engine.block_size,
            key_file=config.kv_events_key_file,
            clients=config.kv_events_clients,
        )
    )
    publisher.start()
    engine.kv_events, engine.blocks.on_evicted = publisher, publisher.evicted
    try:
        yield
    finally:
        engine.kv_events, engine.blocks.on_evicted = None, None
        await publisher.close()
