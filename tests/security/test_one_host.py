"""`antefix up` on one host without certificates: applications need nothing, and other processes get only answers."""

import asyncio
import json

import grpc
import numpy as np
import pytest

from antefix.clients import DecodeClient, PrefillClient, RouterClient, WindowClient
from antefix.errors import Unauthenticated
from antefix.generation_request import Caller, GenerationRequest
from antefix.record import RecordKind
from antefix.sampling import Sampling
from antefix.secret import Keyring
from antefix.security import own_credentials
from antefix.security.credentials import Credentials
from antefix.security.identity import Role
from antefix.store.remote_store import RemoteStore
from antefix_console.cli import main
from antefix_console.deployment import Deployment, DeploymentConfig
from tests.e2e.conftest import MODEL, SMALL_POOL
from tests.security.tls_deployment import ipv6_or_v4
from tests.waiting import AT_MOST_S

pytestmark = pytest.mark.services
PROMPT = np.arange(300, dtype=np.uint32) % 61
# A client without credentials, although this process started the deployment.
STRANGER = Credentials(Role.NOBODY)


async def test_antefix_up_answers_everybody_and_shows_its_insides_to_its_own(tmp_path, capsys, monkeypatch):
    flags = {"prefill": SMALL_POOL, "decode": SMALL_POOL, "kvstore": ("--budget-bytes", "256M")}
    config = DeploymentConfig(
        model=MODEL, data_dir=tmp_path / "data", extra_flags=flags, router_address=f"{ipv6_or_v4()}:0"
    )
    async with Deployment(config) as deployment:
        at = {role: deployment.one(role).address for role in ("router", "prefill", "decode", "kvstore")}
        # 1. An application needs no credentials.
        async with RouterClient(at["router"], credentials=STRANGER) as client:
            for hit in (0, 256):
                answer = [message async for message in client.generate(PROMPT, Sampling(max_tokens=4), tenant="acme")]
                assert answer[-1].usage.cache_hit_tokens == hit
            assert (await client.status()).workers
        # 2. Workers and store refuse a stranger, and the ledger stays complete.
        request = GenerationRequest(tokens=PROMPT, sampling=Sampling(max_tokens=16), caller=Caller(tenant="acme"))
        store = RemoteStore(at["kvstore"], credentials=STRANGER)
        calls = {
            "decode": lambda: decode(at["decode"], request),
            "prefill": lambda: PrefillClient(at["prefill"], credentials=STRANGER).prefill(request, timeout_s=AT_MOST_S),
            "status": lambda: DecodeClient(at["decode"], credentials=STRANGER).status(),
            "strategy": lambda: WindowClient(at["prefill"], credentials=STRANGER).set_strategy("zero"),
            "look up": lambda: store.lookup([bytes(32)], fingerprint=bytes(32)),
            "read": lambda: store.get(RecordKind.CHECKPOINT, bytes(32), fingerprint=bytes(32)),
            "pin": lambda: store.pin([(RecordKind.BLOCK, bytes(32))], duration_s=9, owner=bytes(24)),
            "evict": lambda: store.evict([(RecordKind.BLOCK, bytes(32))], owner=bytes(24)),
            "stats": store.stats,
            "watch": lambda: anext(store.watch()),
        }
        for what, call in calls.items():
            with pytest.raises(Unauthenticated, match="who they are"):
                await call()
                pytest.fail(what)
        await store.close()
        # 3. Health is open to all. Results that need the secret are not made without it.
        async with grpc.aio.insecure_channel(at["decode"]) as channel:
            assert await channel.unary_unary("/grpc.health.v1.Health/Check")(b"", timeout=AT_MOST_S)
        thief = Credentials(Role.ROUTER, keyring=Keyring(b"a thief's own secret, 32 bytes .."))
        with pytest.raises(Unauthenticated):
            await DecodeClient(at["decode"], credentials=thief).status()
        # 4. Commands find the deployment's secret by its data directory.
        monkeypatch.setattr(own_credentials, "_by_address", {})
        await commands(at, config, capsys, monkeypatch, tmp_path)
        assert str(deployment.config.data_dir / "secret") not in said(deployment)
        assert (config.data_dir / "secret").read_text().strip() not in said(deployment)


async def decode(address, request):
    async with DecodeClient(address, credentials=STRANGER) as client:
        async for _ in client.decode(request, request.sampling, handoff=b"", emitted=(), timeout_s=AT_MOST_S):
            pass


async def commands(at, config, capsys, monkeypatch, tmp_path):
    window = ["window", "--worker", at["prefill"], "--json"]
    monkeypatch.chdir(tmp_path)
    assert await asyncio.to_thread(main, window) == 1
    assert "--data-dir" in capsys.readouterr().err
    # From the start directory, the data directory has its usual name.
    config.data_dir.rename(tmp_path / "antefix-data")
    (tmp_path / "data").symlink_to("antefix-data")
    assert await asyncio.to_thread(main, window) == 0
    assert at["prefill"] in json.loads(capsys.readouterr().out)["workers"]


def said(deployment):
    return "".join(process.log_path.read_text() for process in deployment.processes)
