"""Fixtures that several test folders share. Heavy imports wait until a test asks for them."""

import os
from pathlib import Path

import pytest

from tests.redis_servers import redis, shared_redis, start_cluster, start_redis

__all__ = ["redis", "shared_redis", "start_cluster", "start_redis"]

# Triton reads this when it is first imported, whoever imports it (transformers does): without a card the kernels' tests
# run in its interpreter.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def models():
    """The shipped model, loaded once for each KV format that is asked for."""
    from antefix.layout import KVFormat
    from tests import engines

    class Loaded(dict):
        def __missing__(self, kv_format):
            self[kv_format] = engines.load(KVFormat(kv_format))
            return self[kv_format]

    return Loaded()


@pytest.fixture
def store():
    from tests.engines import MemoryStore

    return MemoryStore()


@pytest.fixture
def make_engine(models, store):
    """Engines that share one store, as workers do."""
    from tests import engines

    made = []

    def make(strategy="boundary", kv_format="fp8", num_blocks=128, prefill_chunk=256, priors=None):
        engine = engines.build(
            models[kv_format],
            store,
            strategy=strategy,
            num_blocks=num_blocks,
            prefill_chunk=prefill_chunk,
            priors=priors,
        )
        made.append(engine)
        return engine

    yield make
    for engine in made:
        engine.compute.close()


@pytest.fixture
def make_prompt():
    from tests.engines import prompt_of

    return prompt_of
