"""`--against`: equal workers, a worker with other names for KV, and a worker that computes otherwise under one name."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from antefix import rpc
from antefix.errors import AntefixError, InvalidRequest
from antefix.layout import KVFormat
from antefix.v1 import decode_pb2, decode_pb2_grpc, router_pb2, router_pb2_grpc
from antefix.window import PlanKind
from antefix_console.cli import main
from antefix_console.commands import verify as command
from antefix_console.verify import against
from antefix_console.verify.against import compare_workers
from antefix_console.verify.models import Subject, random_subject
from antefix_console.verify.paired_runs import WorkerPair
from antefix_console.verify.stores import MemoryStore
from antefix_console.verify.verdict import Cases, Report
from antefix_decode.server import DecodeConfig, DecodeServicer
from antefix_prefill.worker.compute_thread import ComputeThread

pytestmark = pytest.mark.slow


@pytest.fixture
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@asynccontextmanager
async def worker(subject: Subject, store: MemoryStore) -> AsyncIterator[str]:
    """A decode worker over gRPC, in this process; yields its address."""
    compute = ComputeThread("worker")
    engine = WorkerPair(subject, compute, 64).new(store, 4096, kind=PlanKind.REPLAY)
    config = DecodeConfig(model=subject.name, store_address="none", secret_file="none")
    servicer = DecodeServicer(engine, SimpleNamespace(eos_ids=frozenset(), special_ids=frozenset()), config)
    server = await rpc.start_server(
        "127.0.0.1:0",
        lambda server: decode_pb2_grpc.add_DecodeServiceServicer_to_server(servicer, server),
        [decode_pb2.DESCRIPTOR],
    )
    try:
        yield server.address
    finally:
        await server.drain(0.1)
        await servicer.scheduler.close()
        compute.close()


@asynccontextmanager
async def router(*addresses: str) -> AsyncIterator[str]:
    class Servicer(router_pb2_grpc.RouterServiceServicer):
        async def RouterStatus(self, request: Any, context: Any) -> router_pb2.RouterStatusResponse:
            workers = [router_pb2.WorkerStatus(address=address, role="decode", serving=True) for address in addresses]
            return router_pb2.RouterStatusResponse(workers=workers)

    server = await rpc.start_server(
        "127.0.0.1:0",
        lambda server: router_pb2_grpc.add_RouterServiceServicer_to_server(Servicer(), server),
        [router_pb2.DESCRIPTOR],
    )
    try:
        yield server.address
    finally:
        await server.drain(0.1)


@pytest.mark.usefixtures("one_thread")
async def test_workers_are_compared_cold_and_by_each_others_kv(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(against, "PROMPT_TOKENS", (17, 30, 41))
    subject, store = random_subject("odd-ratios", KVFormat.FP8), MemoryStore()
    changed = random_subject("odd-ratios", KVFormat.FP8)
    changed.model.lm_head.weight.mul_(1 + 1e-6)
    other_format = random_subject("odd-ratios", KVFormat.FLOAT32)
    async with worker(subject, store) as one, worker(subject, store) as two:
        # 1. Two equal workers, which their router names.
        async with router(one, two) as front:
            report = Report()
            said = await compare_workers([front], report, seed=5)
        assert report.ok
        plans = report.by_plan["against"]
        assert plans["fingerprint"].cases == 1
        assert plans["decode, cold"].cases == 3
        # The second worker hit the first worker's KV, and the answers were the same.
        assert plans["decode, replay"].bit_identical >= 2
        assert "do not prove" in said[1] and len(said) == 2
        # 2. A worker with the same names whose results differ in the last bits.
        async with worker(changed, store) as three:
            report = Report()
            await compare_workers([one, three], report, seed=5)
        assert report.by_plan["against"]["fingerprint"].failed == 0
        assert report.total.failed > 0
        assert all(three in text and "output token" in text for text in report.failures)
        # 3. A worker that gives KV other names.
        async with worker(other_format, store) as four:
            report = Report()
            await compare_workers([one, four], report, seed=5)
        assert any("gives KV other names" in text and four in text for text in report.failures)
        # 4. A comparison needs two workers.
        with pytest.raises(InvalidRequest, match="needs two workers"):
            await compare_workers([one, one], Report(), seed=5)
    with pytest.raises(AntefixError, match="neither a worker nor a router"):
        await compare_workers(["127.0.0.1:1"], Report(), seed=5)


def test_the_command_prints_what_it_shows(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    async def compare(addresses: list[str], report: Report, *, seed: int) -> list[str]:
        Cases(report=report, subject="s", kv_format="as served").add("against", "decode, cold", 9)
        return [f"compared {', '.join(addresses)}", "does not prove the rest"]

    monkeypatch.setattr(command, "compare_workers", compare)
    assert main(["verify", "--against", "a:1", "b:2", "--seed", "7"]) == 0
    said = capsys.readouterr().out
    assert "compared a:1, b:2" in said and "does not prove the rest" in said and "--seed 7" in said
    assert main(["verify", "--against", "a:1", "b:2", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["ok"] and shown["seed"] >= 0
    assert shown["notes"] == ["compared a:1, b:2", "does not prove the rest"]


def test_a_negative_seed_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "--seed", "-1"]) == 2
    assert "--seed" in capsys.readouterr().err
