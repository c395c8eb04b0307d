"""NaN in a whole deployment: stored NaN is quarantined and a miss; computed NaN fails only its own request."""

import asyncio
import shutil

import httpx2
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from antefix.clients import PrefillClient
from antefix.errors import Unavailable
from antefix.record import Record, RecordKind
from antefix.sampling import Sampling
from antefix.secret import Keyring
from antefix.store_files.seal import Seals
from antefix_kvstore.kvstore_config import KvStoreConfig
from antefix_kvstore.storage_engine import StorageEngine
from antefix_router.naming import PromptNames
from tests.small_worker_model import small_worker_model
from tests.waiting import AT_MOST_S

pytestmark = pytest.mark.services
BLOCK = 64
# The padding token, which never appears in an output.
POISON = 261
PROMPTS = [np.random.default_rng(seed).integers(32, 250, 460).astype(np.uint32) for seed in (2, 3)]
OTHER = np.random.default_rng(4).integers(32, 250, 200).astype(np.uint32)
LONG = Sampling(max_tokens=80, ignore_eos=True)


async def output_of(deployment, prompt, sampling):
    return [int(t) async for message in deployment.router.generate(prompt, sampling) for t in message.tokens]


def put_nan(directory, fingerprint, kind, tokens):
    """Replace the last record of a kind with NaN, sealed as by a worker of the deployment."""
    keyring = Keyring.from_file(directory / "secret")
    prompt = PromptNames(fingerprint=fingerprint, keyring=keyring, block_size=BLOCK).prompt("", tokens)
    engine = StorageEngine(KvStoreConfig(dir=str(directory / "store"), budget_bytes=256 << 20))
    number = len(tokens) // BLOCK - 1
    right = engine.read(kind, prompt.chain.hashes[number], fingerprint=fingerprint)
    assert right is not None
    engine.evict([(kind, prompt.chain.hashes[number])])
    record = Record(
        kind=kind,
        hash=prompt.chain.hashes[number],
        parent=prompt.chain.parent(number),
        fingerprint=fingerprint,
        position=(number + 1) * BLOCK,
        payload=b"\xff" * len(right),
        tenant=prompt.owner,
    )
    assert not engine.put([Seals(keyring).seal(record)]).refused
    engine.close()


async def test_stored_nan_is_a_quarantined_miss_and_neighbours_go_on(deploy):
    config = {"model": small_worker_model(), "strategy": "boundary"}
    async with deploy(**config) as deployment:
        cold = [await output_of(deployment, prompt, Sampling(max_tokens=20)) for prompt in PROMPTS]
        alone = await output_of(deployment, OTHER, LONG)
        async with PrefillClient(deployment.one("prefill").address) as client:
            fingerprint = (await client.status()).fingerprint
    for kind, prompt in zip((RecordKind.BLOCK, RecordKind.CHECKPOINT), PROMPTS, strict=True):
        put_nan(deployment.config.data_dir, fingerprint, kind, prompt)
    # New processes, which have no block of the prompt in memory.
    async with deploy(**config) as deployment:
        neighbour = asyncio.create_task(output_of(deployment, OTHER, LONG))
        for _ in range(2):
            for prompt, right in zip(PROMPTS, cold, strict=True):
                assert await output_of(deployment, prompt, Sampling(max_tokens=20)) == right
        assert await neighbour == alone
        shown = await metrics_of(deployment.one("kvstore"))
    assert 'antefix_store_quarantined_records_total{cause="unusable"} 2.0' in shown


async def metrics_of(process):
    async with httpx2.AsyncClient(timeout=AT_MOST_S) as client:
        return (await client.get(f"http://{process.metrics_address}/metrics")).text


@pytest.fixture
def poisoned_model(tmp_path):
    """A model that computes NaN for one token, as a broken card or checkpoint would."""
    directory = tmp_path / "model"
    shutil.copytree(small_worker_model(), directory)
    tensors = load_file(directory / "model.safetensors")
    name = next(name for name in tensors if "embed" in name)
    tensors[name][POISON] = torch.nan
    save_file(tensors, directory / "model.safetensors")
    return directory


async def test_computed_nan_fails_its_request_alone_and_is_not_stored(deploy, poisoned_model):
    bad = PROMPTS[0].copy()
    bad[300] = POISON
    async with deploy(model=poisoned_model, http_address="127.0.0.1:0") as deployment:
        right = await output_of(deployment, bad[:300], Sampling(max_tokens=10))
        alone = await output_of(deployment, OTHER, LONG)
        neighbour = asyncio.create_task(output_of(deployment, OTHER, LONG))
        # 1. Both APIs give a clear error that does not quote torch.
        with pytest.raises(Unavailable, match=r"NaN or infinity|a step of the model failed"):
            await output_of(deployment, bad, Sampling(max_tokens=10))
        async with httpx2.AsyncClient(
            base_url=f"http://{deployment.one('router').http_address}", timeout=AT_MOST_S
        ) as door:
            body = {"model": "x", "prompt": bad.tolist(), "max_tokens": 4, "temperature": 0}
            body["model"] = (await door.get("/v1/models")).json()["data"][0]["id"]
            answer = await door.post("/v1/completions", json=body, timeout=AT_MOST_S)
        assert answer.status_code == 503
        message = answer.json()["error"]["message"]
        assert "NaN or infinity" in message or "a step of the model failed" in message
        # 2. No other request is affected, and all stored blocks are right.
        assert await neighbour == alone
        assert await output_of(deployment, bad[:300], Sampling(max_tokens=10)) == right
        assert all(process.alive for process in deployment.processes)
