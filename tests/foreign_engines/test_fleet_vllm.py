"""A fleet router with vLLM itself: vLLM's event decoder, its publisher, and two of its workers. `make test-engines`."""

import asyncio
import json
import signal
import subprocess
import time
from pathlib import Path

import httpx
import numpy as np
import pytest
import zmq.asyncio

from antefix.events.kv_events import CPU, GPU, KvCleared, KvRemoved, KvStored, encode_batch
from antefix.events.kv_subscriber import KvSubscriber
from antefix.secret import Keyring
from antefix_billing.usage_record import Status
from antefix_router.fleet.engine_index import EngineIndex
from antefix_router.fleet.fleet_names import FleetNames
from antefix_router.placement.directory import Directory
from benchmarks.fleet_engines import agents, records_of, routed, run_policy
from tests.foreign_engines.vllm_workers import MODEL_NAME, PYTHON, VllmWorker, make_model, missing

pytestmark = [pytest.mark.engines, pytest.mark.services, pytest.mark.timeout(3600)]

DECODE = """
import sys, json, msgspec
from vllm.distributed.kv_events import KVEventBatch
batch = msgspec.msgpack.Decoder(KVEventBatch).decode(sys.stdin.buffer.read())
hexed = lambda value: value.hex() if isinstance(value, bytes) else str(value)
events = json.dumps([msgspec.to_builtins(event) for event in batch.events], default=hexed)
print("DECODED " + events, batch.data_parallel_rank)
"""
SIZE = 16


@pytest.fixture(scope="module", autouse=True)
def installed():
    if reason := missing():
        pytest.skip(reason)


def test_vllms_decoder_reads_what_we_write():
    events = [
        KvStored(
            block_hashes=[b"b" * 32, b"c" * 32],
            parent_block_hash=b"a" * 32,
            token_ids=[1, 2, 3, 4],
            block_size=2,
            lora_id=None,
            medium=GPU,
            lora_name=None,
            extra_keys=[["salt"], None],
            locality="LOCAL",
            cache_salt="salt",
        ),
        KvRemoved(block_hashes=[b"b" * 32], medium=CPU, group_idx=1),
        KvCleared(),
    ]
    payload = encode_batch(events, ts=1.5, rank=3)
    done = subprocess.run([str(PYTHON), "-c", DECODE], input=payload, capture_output=True, timeout=600)
    (line,) = [line for line in done.stdout.decode().splitlines() if line.startswith("DECODED")]
    found, rank = json.loads(line[8:].rpartition(" ")[0]), line.rpartition(" ")[2]
    assert [event["type"] for event in found] == ["BlockStored", "BlockRemoved", "AllBlocksCleared"]
    stored, removed, _ = found
    assert (stored["token_ids"], stored["block_size"], stored["medium"], stored["locality"]) == (
        [1, 2, 3, 4],
        2,
        GPU,
        "LOCAL",
    )
    assert stored["extra_keys"] == [["salt"], None]
    assert (removed["medium"], removed["group_idx"], rank) == (CPU, 1, "3")


class Publisher:
    """vLLM's publisher in a separate process."""

    def __init__(self, directory, *, buffer_steps=10_000):
        self.events, self.replay = f"ipc://{directory}/events", f"ipc://{directory}/replay"
        script = Path(__file__).with_name("vllm_publisher.py")
        self.process = subprocess.Popen(
            [str(PYTHON), str(script), self.events, self.replay, str(buffer_steps)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.answer()

    def answer(self):
        for line in self.process.stdout:
            if line.strip() == "ok":
                return
        raise RuntimeError("vLLM's publisher ended")

    def tell(self, **order):
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        self.answer()

    def kill(self):
        self.process.kill()
        self.process.wait()


@pytest.fixture
async def followed(tmp_path):
    """start(**options) -> (publisher, subscriber, num_leading())."""
    opened = []

    async def start(**options):
        publisher = Publisher(tmp_path, **options)
        directory, names = Directory(), FleetNames(Keyring(b"0123456789abcdef"))
        index, context = EngineIndex("engine", directory, names), zmq.asyncio.Context()
        subscriber = KvSubscriber(publisher.events, index, context, replay=publisher.replay, quiet_s=0.5)
        task = asyncio.create_task(subscriber.run())
        opened.append((publisher, context, task))
        keys = names.prompt(np.arange(40 * SIZE, dtype=np.uint32), "", SIZE).keys
        return publisher, subscriber, lambda: int(directory.leading(["engine"], keys)[0])

    yield start
    for publisher, context, task in opened:
        publisher.kill()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        context.destroy(linger=0)


async def until(condition, timeout_s=120):
    ends = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < ends
        await asyncio.sleep(0.02)


async def test_vllms_publisher_is_followed(followed):
    publisher, subscriber, leading = await followed()
    await until(lambda: subscriber.in_step)
    publisher.tell(store=[0, 5])
    publisher.tell(store=[5, 9])
    await until(lambda: leading() == 9)
    publisher.tell(remove=[8, 7])
    await until(lambda: leading() == 7)
    publisher.tell(clear=True)
    await until(lambda: leading() == 0)


async def test_what_vllm_told_before_us_is_replayed_and_so_is_what_was_lost(followed):
    publisher, subscriber, leading = await followed()
    publisher.tell(store=[0, 5])
    await until(lambda: leading() == 5)
    publisher.tell(lose=True)
    publisher.tell(store=[5, 6])
    publisher.tell(remove=[5])
    publisher.tell(store=[5, 8])
    publisher.tell(lose=False)
    publisher.tell(store=[8, 10])
    await until(lambda: leading() == 10)
    assert subscriber.counters.num_gaps == 1
    assert subscriber.counters.num_forgotten == 0
    publisher.tell(lose=True)
    publisher.tell(remove=[9])
    # No later event reveals the loss, so silence must reveal it.
    await until(lambda: leading() == 9)


async def test_what_vllm_has_no_more_is_forgotten(followed):
    publisher, subscriber, leading = await followed(buffer_steps=2)
    publisher.tell(store=[0, 5])
    await until(lambda: leading() == 5)
    publisher.tell(lose=True)
    for block in range(5, 10):
        publisher.tell(store=[block, block + 1])
    publisher.tell(lose=False)
    publisher.tell(store=[0, 3])
    await until(lambda: leading() == 3)
    assert subscriber.counters.num_forgotten >= 1


async def test_a_vllm_that_starts_again_is_another_one(followed, tmp_path):
    publisher, subscriber, leading = await followed()
    for first in range(0, 8, 2):
        publisher.tell(store=[first, first + 2])
    await until(lambda: leading() == 8)
    publisher.kill()
    again = Publisher(tmp_path)
    try:
        again.tell(store=[0, 3])
        await until(lambda: leading() == 3)
        assert subscriber.counters.num_lives == 1
    finally:
        again.kill()


@pytest.fixture(scope="module")
def workers(tmp_path_factory):
    directory = tmp_path_factory.mktemp("vllm")
    make_model(directory / "model")
    started = [VllmWorker(directory, number) for number in range(2)]
    try:
        for worker in started:
            worker.start()
        for worker in started:
            worker.wait()
        yield started
    finally:
        for worker in started:
            worker.stop()


async def test_agents_hit_more_than_with_round_robin(workers, tmp_path):
    theirs = await run_policy("round_robin", workers, tmp_path)
    ours = await run_policy("least_work", workers, tmp_path)
    assert ours.num_requests == theirs.num_requests
    assert min(ours.requests_by_worker) > 0
    assert ours.hit_rate > theirs.hit_rate + 0.05
    # No block was evicted, so the hits equal those that the events promised.
    assert ours.lost_tokens <= 0.01 * ours.expected_tokens


async def test_a_killed_worker_costs_no_answer_and_comes_back(workers, tmp_path):
    async with routed(workers, tmp_path, ledger_dir=str(tmp_path / "ledger")) as (router, url):
        engines = router.engines.engines
        await agents(url, "before", num_turns=2)
        running = asyncio.create_task(agents(url, "through", num_turns=4))
        await asyncio.sleep(1.0)
        await asyncio.to_thread(workers[0].stop, how=signal.SIGKILL)
        usages = await running
        assert len(usages) == 24
        await until(lambda: not engines[0].is_up and not len(engines[0].index), 60)
        workers[0].start()
        await asyncio.to_thread(workers[0].wait)
        await until(lambda: engines[0].is_up and engines[0].tells, 60)
        held = len(engines[1].index)
        await agents(url, "after", num_turns=3)
        assert len(engines[0].index) > 0
        assert len(engines[1].index) >= held
        records = records_of(tmp_path / "ledger")
        assert {record.status for record in records} <= {Status.LENGTH, Status.STOP}
        assert sum(record.prompt_tokens for record in records[-18:]) > 0


async def test_streams_tools_and_refusals_of_vllm_pass_through(workers, tmp_path):
    async with (
        routed(workers, tmp_path) as (_, url),
        httpx.AsyncClient(base_url=url, timeout=600, trust_env=False) as client,
    ):
        body = {"model": MODEL_NAME, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 5}
        tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
        whole = (
            await client.post("/v1/chat/completions", json={**body, "tools": [tool], "tool_choice": "none"})
        ).json()
        assert whole["usage"]["completion_tokens"] == 5
        streamed = await client.post("/v1/chat/completions", json={**body, "stream": True})
        events = [line[6:] for line in streamed.text.splitlines() if line.startswith("data: ")]
        assert events[-1] == "[DONE]"
        assert all("usage" not in json.loads(event) for event in events[:-1])
        refused = await client.post("/v1/chat/completions", json={**body, "temperature": "hot"})
        assert refused.status_code == 400
        assert "temperature" in refused.text
        text = await client.post("/v1/completions", json={"model": MODEL_NAME, "prompt": "abc", "max_tokens": 3})
        assert text.json()["usage"]["prompt_tokens"] == 3
