"""The tier over a kvstore service that several hosts share and that may stop."""

import pytest

from antefix.blocking import LoopThread
from antefix.secret import create_secret_file
from tests.foreign_engines import vllm_stand_in
from tests.foreign_engines.vllm_stand_in import Engine
from tests.store.test_service import Service
from tests.waiting import wait_until

pytestmark = pytest.mark.slow

PROMPT = list(range(600))


@pytest.fixture(scope="module")
def vllm():
    with vllm_stand_in.stand_in() as modules:
        yield modules


@pytest.fixture
def served(tmp_path):
    loop, service = LoopThread(), Service(tmp_path / "data" / "store")
    loop.run(service.start())
    create_secret_file(tmp_path / "data" / "secret")
    yield loop, service
    loop.run(service.stop())
    loop.close()


@pytest.fixture
def start(vllm, tmp_path, served):
    started = []

    def start(**settings):
        own = {
            "address": served[1].address,
            "secret_file": str(tmp_path / "data" / "secret"),
            "weights_revision": "w",
            "lookup_wait_s": 30.0,
        }
        started.append(Engine(vllm, own | settings))
        return started[-1]

    yield start
    for engine in started:
        engine.close()


def test_hosts_share_what_one_of_them_stored(start, tmp_path):
    one, other, local = start(), start(), start(directory=str(tmp_path / "data"))
    one.store(PROMPT)
    for engine in (other, local):
        assert engine.num_hit(PROMPT) == 512
        rows, result = engine.restore(PROMPT, 512)
        assert result.success
        run = engine.tier.rows.pages.runs[3][0]
        theirs = vllm_stand_in.row_bytes(PROMPT, 3, 512, engine.config.worker_kv_bytes_per_block)
        assert (run.used(rows[3, 512]) == run.used(theirs)).all()
    assert (other.tier.locality.value, local.tier.locality.value) == ("REMOTE", "LOCAL")


def test_another_secret_or_tenant_finds_nothing(start, tmp_path):
    start().store(PROMPT)
    assert start(tenant="other").num_hit(PROMPT) == 0
    assert start(secret_file=str(create_secret_file(tmp_path / "other"))).num_hit(PROMPT) == 0


def test_a_service_that_stops_is_a_miss_and_is_used_again_when_it_is_back(start, served):
    loop, service = served
    engine = start()
    engine.store(PROMPT)
    context = engine.request(PROMPT)
    assert engine.num_hit(PROMPT, context) == 512
    loop.run(service.stop())
    _, result = engine.restore(PROMPT, 512, context)
    assert not result.success and not result.successful_keys
    assert engine.num_hit(PROMPT) == 0
    assert not any(each.success for each in engine.store(list(range(5000, 5600))))
    loop.run(service.start())
    # gRPC tries the connection again after a pause of up to some seconds.
    # Look-ups and reads have connections of their own, so a read may still fail after a look-up has hit.
    wait_until(lambda: engine.num_hit(PROMPT) == 512 and engine.restore(PROMPT, 512)[1].success, "a restore")
