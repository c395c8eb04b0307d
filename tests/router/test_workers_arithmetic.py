"""A router learns its workers' arithmetic, and refuses workers with a different one."""

import time
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest

from antefix.block import CPU_FLOAT32
from antefix.errors import ConfigError, FingerprintMismatch, Unavailable
from antefix.layout import KVFormat
from antefix.model_dir import identify
from antefix.registration import Registration
from antefix.secret import create_secret_file
from antefix.tokenizer import load_tokenizer
from antefix.v1 import router_pb2
from antefix_router import workers_arithmetic
from antefix_router.assembly import Router
from antefix_router.router_config import RouterConfig
from antefix_router.server import RouterServicer
from antefix_router.workers_arithmetic import Said, agreed, learn
from tests.engines import MODEL, MemoryStore

ONE, OTHER = "cpu-float32-0123456789-0123456789", "cpu-float32-0123456789-ffffffffff-t3"


@dataclass
class Asked:
    """A worker that reports a given arithmetic. A late worker answers only from the second call on."""

    arithmetic: str
    is_late: bool = False
    role: str = "decode"
    address: str = "127.0.0.1:1"
    setup: str = ""

    @property
    def client(self):
        return self

    async def status(self, *, timeout_s):
        if self.is_late:
            self.is_late = False
            raise Unavailable("not yet")
        return SimpleNamespace(arithmetic=self.arithmetic, setup="some processor")


async def test_workers_are_asked_until_one_has_said_it(monkeypatch):
    monkeypatch.setattr(workers_arithmetic, "_RETRY_S", 0.0)
    late = Asked(ONE, is_late=True)
    assert await learn([late]) == ONE
    assert (late.arithmetic, late.setup) == (ONE, "some processor")
    assert await learn([Asked(ONE), Asked(OTHER, is_late=True)]) == ONE


async def test_two_arithmetics_are_refused_and_both_are_named():
    with pytest.raises(ConfigError, match=rf"{ONE} \(some processor\).*{OTHER} \(some processor\)"):
        await learn([Asked(ONE), Asked(ONE), Asked(OTHER)])
    assert agreed([]) == ""
    assert agreed([Said(who="a", arithmetic=ONE, setup=""), Said(who="b", arithmetic=ONE, setup="else")]) == ONE


@pytest.fixture
async def make_router(tmp_path):
    made = []

    def make(**settings):
        secret = create_secret_file(tmp_path / "secret")
        config = RouterConfig(
            model=str(MODEL), secret_file=str(secret), store_address="127.0.0.1:9", leases=True, **settings
        )
        servicer = RouterServicer(Router(identify(MODEL), load_tokenizer(MODEL), MemoryStore(), config))
        made.append(servicer)
        return servicer

    yield make
    for servicer in made:
        await servicer.router.front.accounts.close()
        await servicer.router.leases.close()
        await servicer.router.pins.close()


def fingerprint_of(arithmetic):
    return identify(MODEL).fingerprint(KVFormat.FP8, arithmetic=arithmetic).digest


async def register(router, arithmetic, address="127.0.0.1:7001", ttl_s=10.0, fingerprint=None):
    said = Registration(
        role="decode",
        address=address,
        fingerprint=fingerprint or fingerprint_of(arithmetic),
        instance=b"1",
        ttl_s=ttl_s,
        said_at_ms=round(1000 * time.time()),
    )
    request = router_pb2.RegisterWorkerRequest(
        role=said.role,
        address=address,
        fingerprint=said.fingerprint,
        instance=said.instance,
        ttl_s=ttl_s,
        said_at_ms=said.said_at_ms,
        proof=said.proof(router.router.keyring),
        arithmetic=arithmetic,
        setup=f"where {arithmetic} is",
    )
    await router.RegisterWorker(request, None)


async def named(router):
    status = await router.RouterStatus(router_pb2.RouterStatusRequest(), None)
    prompt = router.router._names.prompt("", some_tokens())
    return status, prompt.chain.root


def some_tokens():

    return np.arange(200, dtype=np.uint32)


async def test_the_first_that_registers_says_what_goes_into_names_and_others_are_refused(make_router):
    router = make_router()
    assert (await named(router))[0].arithmetic == CPU_FLOAT32
    await register(router, ONE)
    status, root = await named(router)
    assert (status.arithmetic, status.fingerprint) == (ONE, fingerprint_of(ONE))
    assert router.router.front.accounts.served.fingerprint == fingerprint_of(ONE).hex()
    assert [(worker.arithmetic, worker.setup) for worker in status.workers] == [(ONE, f"where {ONE} is")]
    with pytest.raises(FingerprintMismatch, match=rf"where {ONE} is.*where {OTHER} is"):
        await register(router, OTHER, address="127.0.0.1:7002")
    assert len((await named(router))[0].workers) == 1
    # When all earlier workers have left, workers with another arithmetic may come, as in an upgrade.
    await register(router, ONE, ttl_s=0.0)
    await register(router, OTHER, address="127.0.0.1:7002")
    status, other_root = await named(router)
    assert status.arithmetic == OTHER
    assert other_root != root


async def test_a_router_that_was_told_refuses_all_others(make_router):
    router = make_router(arithmetic=ONE)
    with pytest.raises(FingerprintMismatch, match="arithmetic differs"):
        await register(router, OTHER)
    await register(router, ONE)


async def test_other_weights_are_not_taken_for_another_arithmetic(make_router):
    router = make_router()
    with pytest.raises(FingerprintMismatch, match="weights"):
        await register(router, ONE, fingerprint=b"f" * 32)
    assert (await named(router))[0].arithmetic == CPU_FLOAT32
