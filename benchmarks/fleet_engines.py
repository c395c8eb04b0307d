"""Compares least_work and round_robin for agents' conversations on two vLLM workers behind a fleet router, in one run.

    PYTHONPATH=. python benchmarks/fleet_engines.py --json benchmarks/results/fleet_engines.json

vLLM runs in a separate environment (`make test-engines`), on a CPU, with a random model of two layers. The benchmark
measures hits and placement. The measured times are those of a small model on a shared machine. Both placement policies
get conversations of the same shape but with different text, so that neither hits KV that the other one left.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import httpx

from antefix.secret import Keyring
from antefix_billing.ledger_files import read_settled
from antefix_billing.usage_record import UsageRecord
from antefix_router.fleet.fleet_config import FleetConfig
from antefix_router.fleet.fleet_door import PATHS, build_fleet_app
from antefix_router.fleet.fleet_router import FleetRouter
from antefix_router.gateway.access import HttpMeasures
from antefix_router.gateway.app import serve_door
from tests.foreign_engines.vllm_workers import MODEL_NAME, VllmWorker, make_model

# Like coding agents: a long common prefix, a tool's output each turn, and the whole conversation resent each turn.
NUM_AGENTS = 6
NUM_TURNS = 8
SYSTEM_CHARACTERS = 1_500
TURN_CHARACTERS = 350
_WORDS = (
    *("open", "file", "read", "line", "test", "edit", "build", "error", "fix", "run"),
    *("path", "name", "value", "list", "call", "return", "check", "next", "state", "item"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyRun:
    """One policy's run. The workers reported the token counts. expected_tokens: the hits that the router predicted."""

    policy: str
    num_requests: int
    prompt_tokens: int
    hit_tokens: int
    expected_tokens: int
    lost_tokens: int
    hit_rate: float
    answer_p50_s: float
    requests_by_worker: tuple[int, ...]


@contextlib.asynccontextmanager
async def routed(
    workers: Sequence[VllmWorker], directory: Path, **settings: object
) -> AsyncIterator[tuple[FleetRouter, str]]:
    """A router in front of the workers, in this process, and its address."""
    config = FleetConfig(
        workers=tuple(worker.url for worker in workers),
        events=tuple(worker.events for worker in workers),
        replay=tuple(worker.replay for worker in workers),
        http_address="127.0.0.1:0",
        secret_file=str(directory / "secret"),
        **settings,  # type: ignore[arg-type]
    )
    router = FleetRouter(config, Keyring(b"0123456789abcdef"))
    await router.start()
    measures = HttpMeasures(PATHS)
    http = await serve_door(router.door, build_fleet_app(router.door, config, measures), config, measures)
    try:
        yield router, f"http://{http.address}"
    finally:
        await http.stop()
        await router.close()


async def agents(
    url: str, name: str, *, num_turns: int = NUM_TURNS, num_agents: int = NUM_AGENTS
) -> list[dict[str, object]]:
    """Run all agents at once; returns each answer's usage."""
    async with httpx.AsyncClient(base_url=url, timeout=600, trust_env=False) as client:
        usages = await asyncio.gather(*(_agent(client, name, number, num_turns) for number in range(num_agents)))
    return [usage for each in usages for usage in each]


async def _agent(client: httpx.AsyncClient, name: str, number: int, num_turns: int) -> list[dict[str, object]]:
    rng = random.Random(f"{name} {number}")
    system = f"{name}, agent {number}: " + _text(rng, SYSTEM_CHARACTERS)
    messages = [{"role": "system", "content": system}]
    usages = []
    for turn in range(num_turns):
        messages.append({"role": "user", "content": f"turn {turn}: " + _text(rng, TURN_CHARACTERS)})
        body = {"model": MODEL_NAME, "messages": messages, "max_tokens": 8, "temperature": 0, "ignore_eos": True}
        answer = await client.post("/v1/chat/completions", json=body)
        answer.raise_for_status()
        usages.append(answer.json()["usage"])
        messages.append({"role": "assistant", "content": answer.json()["choices"][0]["message"]["content"] or ""})
        # The pause of a running tool.
        await asyncio.sleep(rng.uniform(0.0, 0.2))
    return usages


async def run_policy(policy: str, workers: Sequence[VllmWorker], directory: Path) -> PolicyRun:
    ledger = directory / f"ledger-{policy}"
    async with routed(workers, directory, policy=policy, ledger_dir=str(ledger)) as (router, url):
        usages = await agents(url, policy)
        engines = router.engines.engines
        hits = [engine.hits for engine in engines]
        records = records_of(ledger)
        served = tuple(sum(record.worker == engine.place.address for record in records) for engine in engines)
    prompt = sum(record.prompt_tokens for record in records)
    hit = sum(record.cache_hit_tokens for record in records)
    if (prompt, len(records)) != (sum(int(str(usage["prompt_tokens"])) for usage in usages), len(usages)):
        raise RuntimeError("the bill differs from what the workers reported")
    answers = sorted((record.finished_us - record.started_us) / 1e6 for record in records)
    return PolicyRun(
        policy=policy,
        num_requests=len(records),
        prompt_tokens=prompt,
        hit_tokens=hit,
        expected_tokens=sum(each.expected for each in hits),
        lost_tokens=sum(each.lost for each in hits),
        hit_rate=hit / prompt,
        answer_p50_s=answers[len(answers) // 2],
        requests_by_worker=served,
    )


def records_of(ledger: Path) -> list[UsageRecord]:
    return [item.record for item in read_settled(ledger)]


def _text(rng: random.Random, num_characters: int) -> str:
    text = ""
    while len(text) < num_characters:
        text += rng.choice(_WORDS) + " "
    return text


async def measure() -> list[PolicyRun]:
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        make_model(directory / "model")
        workers = [VllmWorker(directory, number) for number in range(2)]
        try:
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.wait()
            return [await run_policy(policy, workers, directory) for policy in ("round_robin", "least_work")]
        finally:
            for worker in workers:
                worker.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the JSON here")
    args = parser.parse_args()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    report = {
        "commit": commit.stdout.strip(),
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "command": " ".join(["benchmarks/fleet_engines.py", *sys.argv[1:]]),
        "engine": "vLLM 0.32.0 for CPUs, two workers, a random model of two layers",
        "policies": [asdict(run) for run in asyncio.run(measure())],
    }
    print(json.dumps(report, indent=1))
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
