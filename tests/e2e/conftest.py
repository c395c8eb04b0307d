"""Real processes on 127.0.0.1, started through the same code as `antefix up`."""

from pathlib import Path

import numpy as np
import pytest

from antefix.layout import KVFormat
from antefix.sampling import Sampling
from antefix_console.bare_model import Reference
from antefix_console.deployment import Deployment, DeploymentConfig
from tests.small_worker_model import small_worker_model

MODEL = Path(__file__).parents[2] / "models" / "antefix-tiny"
SMALL_POOL = ("--pool-bytes", "64M")


@pytest.fixture
def make_config(tmp_path):
    def make(**changes):
        flags = {"prefill": SMALL_POOL, "decode": SMALL_POOL, "kvstore": ("--budget-bytes", "256M")}
        flags.update(changes.pop("extra_flags", {}))
        model = changes.pop("model", MODEL)
        return DeploymentConfig(model=model, data_dir=tmp_path / "data", extra_flags=flags, **changes)

    return make


@pytest.fixture
def deploy(make_config):
    """`async with deploy(strategy="zero") as deployment:`"""

    def make(**changes):
        return Deployment(make_config(**changes))

    return make


@pytest.fixture(scope="session")
def reference():
    return Reference(MODEL, KVFormat.FP8)


@pytest.fixture(scope="session")
def small_model():
    """For tests with many requests and no timing: a model that decodes much faster than the shipped one."""
    return small_worker_model()


@pytest.fixture(scope="session")
def small_reference(small_model):
    return Reference(small_model, KVFormat.FP8)


@pytest.fixture
def ask():
    """Send one request. Returns its output tokens and its last message."""

    async def ask(deployment, prompt, max_tokens=24, **options):
        sampling = options.pop("sampling", None) or Sampling(max_tokens=max_tokens)
        output, last = [], None
        async for message in deployment.router.generate(np.asarray(prompt, np.uint32), sampling, **options):
            output += [int(token) for token in message.tokens]
            last = message
        return output, last

    return ask


@pytest.fixture
def busy_decode():
    """The decode worker that computes now, or None: on a busy machine an answer may have ended before it is read."""

    async def busy_decode(deployment):
        workers = (await deployment.router.status()).workers
        busy = [worker.address for worker in workers if worker.role == "decode" and worker.num_requests]
        return next((each for each in deployment.processes if each.alive and each.address in busy), None)

    return busy_decode


@pytest.fixture(scope="session")
def document():
    """Text-like tokens: bytes of this repository's license, long enough for some blocks."""
    text = (Path(__file__).parents[2] / "LICENSE").read_bytes()
    return np.frombuffer(text[:2500], np.uint8).astype(np.uint32)
