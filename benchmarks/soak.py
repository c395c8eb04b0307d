"""Do real processes stay correct, fast and small for hours, while workers are killed and clients disconnect?

    python benchmarks/soak.py --minutes 60 --trace ../shared/traces/claude_code_80.jsonl.gz --out soak.json
    python benchmarks/soak.py --minutes 60 --ttl-divisor 10 ...      # records live for a tenth of their usual time

The deployment has one router, two prefill and two decode workers that register by lease, and one store. Several clients
play conversations of an agents' trace at once, with one token for each of its 64-token hashes. Some requests are sent
several times at once, and some are cancelled. Every answer is compared with a run of the bare model. One worker of each
role is killed (kill -9) at random times and restarted; the others keep running. The benchmark samples the memory,
descriptors and threads of the processes that keep running, and the disk space of the store, the bill and the logs. The
benchmark fits a line to each series after the warm-up, which must be long enough for the store to reach its size.
"grew" names the series that are not flat (benchmarks/soak_samples.py).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import json
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from antefix.byte_size import parse_byte_size
from antefix.clients import RouterClient
from antefix.errors import AntefixError
from antefix.layout import KVFormat
from antefix.sampling import Sampling
from antefix.store.remote_store import RemoteStore
from antefix_console.bare_model import Reference
from antefix_console.deployment import Deployment, DeploymentConfig, RoleProcess
from antefix_simulate.trace import TraceRequest, load
from benchmarks.processor_time import cpu_s
from benchmarks.run_record import about
from benchmarks.soak_files import num_segments
from benchmarks.soak_samples import Samples, disk_mb, num_threads
from tests.kvstore.small_store import BLOCK, Prompt

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "models" / "antefix-tiny"
Tokens = npt.NDArray[np.uint32]

# Tokens of the system prompt that all conversations share.
SYSTEM_TOKENS = 192
# Tokens of the longest prompt, unless the command says otherwise: two cores need too long for longer ones.
PROMPT_TOKENS_MAX = 4000
# A burst's prompts are shorter, so that the whole burst ends within the time limit.
BURST_TOKENS_MAX = 600
FILLER_BLOCKS, FILLER_BYTES = 16, 20_000
STUCK_S = 180.0
SAMPLE_S, SAVE_S = 10.0, 60.0
RESTART_S = 3.0
# The store's default times to live.
TTLS_S = {"block": 72 * 3600.0, "checkpoint": 6 * 3600.0, "handoff": 300.0}


@dataclass(slots=True)
class Tally:
    """Counts of requests by outcome."""

    num_done: int = 0
    num_wrong: int = 0
    num_stuck: int = 0
    num_cancelled: int = 0
    num_kills: int = 0
    hit_tokens: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    ttft_s: list[float] = field(default_factory=list)
    errors: dict[str, int] = field(default_factory=dict)
    wrong: list[dict[str, Any]] = field(default_factory=list)


class Soak:
    """One run over one deployment."""

    def __init__(self, args: argparse.Namespace, deployment: Deployment) -> None:
        self.args = args
        self.deployment = deployment
        self.tally = Tally()
        self.rng = random.Random(args.seed)
        self.reference = Reference(MODEL, KVFormat.FP8)
        self.computing = asyncio.Lock()
        self.started = time.monotonic()
        self.samples: dict[str, Samples] = {}
        self.victims: dict[str, RoleProcess] = {}
        self.steady: dict[str, RoleProcess] = {}
        self.client: RouterClient
        self.cpu_before_s = 0.0

    @property
    def ends(self) -> float:
        return self.started + 60 * self.args.minutes

    async def start(self) -> None:
        """Start a store, a router that knows no workers, and workers that register with the router."""
        config = self.deployment.config
        (config.data_dir / "logs").mkdir(parents=True)
        secret = config.data_dir / "secret"
        secret.write_text("ab" * 32)
        secret.chmod(0o600)
        store = await self.store()
        flags = ["--leases", "true", "--ledger-dir", str(config.ledger_dir), "--prefill-tokens-min", "32"]
        router = await self.deployment.start_role("router", [*self.shared(), *flags])
        self.client = RouterClient(router.address)
        self.steady = {"kvstore": store, "router": router}
        for role in ("prefill", "decode"):
            self.steady[role] = await self.worker(role)
            self.victims[role] = await self.worker(role)
        while len((await self.client.status()).workers) < 4:  # noqa: ASYNC110 - another process's state
            await asyncio.sleep(0.2)
        if self.args.fill_store:
            await self.fill()
        self.cpu_before_s = cpu_s(router.process.pid)
        self.started = time.monotonic()

    async def fill(self) -> None:
        """Put blocks that nobody reads into the store until it has evicted some, so that it has its full size."""
        async with RemoteStore(self.steady["kvstore"].address) as store:
            for number in range(2 * parse_byte_size(self.args.store_bytes) // (FILLER_BLOCKS * FILLER_BYTES) + 1):
                prompt = Prompt([number] * BLOCK * FILLER_BLOCKS, payload_bytes=FILLER_BYTES)
                await store.put(prompt.blocks())

    def shared(self) -> list[str]:
        return self.deployment._shared_flags()

    async def store(self, address: str = "127.0.0.1:0") -> RoleProcess:
        flags = ["--dir", str(self.deployment.config.store_dir), "--address", address]
        if self.args.ttl_divisor != 1:
            for name, seconds in TTLS_S.items():
                flags += [f"--{name}-ttl-s", str(seconds / self.args.ttl_divisor)]
        return await self.deployment.start_role("kvstore", flags)

    async def worker(self, role: str) -> RoleProcess:
        flags = ["--threads", "1", "--strategy", "auto", "--routers", self.client.address]
        return await self.deployment.start_role(role, [*self.shared(), *flags])

    async def run(self) -> None:
        """Play conversations until the time is over, then wait for the requests that still run."""
        helpers = [asyncio.create_task(each()) for each in (self.sample, self.kill, self.save)]
        trace, num_max = self.args.trace, self.args.prompt_tokens_max
        conversations = playable(trace, self.rng, num_max)
        try:
            players = [self.play(conversations) for _ in range(self.args.clients)]
            await asyncio.gather(*players, self.burst(playable(trace, random.Random(self.args.seed + 1), num_max)))
        finally:
            for helper in helpers:
                helper.cancel()
            await asyncio.gather(*helpers, return_exceptions=True)

    async def burst(self, conversations: Iterator[list[Tokens]]) -> None:
        """Send many requests at once, some times, so that pools of threads and files reach their full size early."""
        short = (prompt[:BURST_TOKENS_MAX] for prompts in conversations for prompt in prompts[:1])
        for _ in range(self.args.bursts):
            await asyncio.gather(*(self.request(prompt, 1.0) for prompt in islice(short, self.args.burst_requests)))

    async def play(self, conversations: Iterator[list[Tokens]]) -> None:
        """One client: one conversation after the other, at its own pace."""
        for prompts in conversations:
            for prompt in prompts:
                await asyncio.sleep(self.rng.expovariate(1 / self.args.think_s))
                if time.monotonic() > self.ends:
                    return
                twins = self.rng.choice((2, 3, 4)) if self.rng.random() < self.args.twins else 1
                await asyncio.gather(*(self.request(prompt, self.rng.random()) for _ in range(twins)))

    async def request(self, prompt: Tokens, chance: float) -> None:
        if chance < self.args.cancels:
            patience_s = self.rng.uniform(0.02, 1.0)
            with contextlib.suppress(TimeoutError, AntefixError):
                async with asyncio.timeout(patience_s):
                    await self.ask(prompt)
            self.tally.num_cancelled += 1
            return
        tally = self.tally
        try:
            async with asyncio.timeout(STUCK_S):
                output = await self.ask(prompt, counted=True)
        except TimeoutError:
            tally.num_stuck += 1
            return
        except AntefixError as err:
            kind = f"{type(err).__name__}: {err}"[:120]
            tally.errors[kind] = tally.errors.get(kind, 0) + 1
            return
        tally.num_done += 1
        async with self.computing:
            expected = await asyncio.to_thread(self.reference.generate, prompt, self.args.max_tokens)
        if output != expected:
            tally.num_wrong += 1
            tally.wrong.append({"prompt_tokens": len(prompt), "output": output, "expected": expected})

    async def ask(self, prompt: Tokens, *, counted: bool = False) -> list[int]:
        output: list[int] = []
        begun = time.monotonic()
        last = None
        async for message in self.client.generate(prompt, Sampling(max_tokens=self.args.max_tokens), timeout_s=STUCK_S):
            if counted and not output and len(message.tokens):
                self.tally.ttft_s.append(time.monotonic() - begun)
            output += [int(token) for token in message.tokens]
            last = message
        if counted and last is not None and last.usage is not None:
            self.tally.prompt_tokens += last.usage.prompt_tokens
            self.tally.hit_tokens += last.usage.cache_hit_tokens
            self.tally.output_tokens += last.usage.output_tokens
        return output

    async def kill(self) -> None:
        """Kill a worker of each role in turn; a new process replaces it after some seconds."""
        while True:
            await asyncio.sleep(self.rng.expovariate(1 / self.args.kill_every_s))
            role = self.rng.choice(sorted(self.victims) + ["kvstore"] * self.args.kill_store)
            await self.deployment.kill(self.steady[role] if role == "kvstore" else self.victims[role])
            self.tally.num_kills += 1
            await asyncio.sleep(RESTART_S)
            if role == "kvstore":
                self.steady[role] = await self.store(self.steady[role].address)
            else:
                self.victims[role] = await self.worker(role)

    async def sample(self) -> None:
        while True:
            at_s = time.monotonic() - self.started
            for role, process in self.steady.items():
                if process.alive:
                    self.samples_of(role).add_process(at_s, process.process.pid, self.directories["store"])
            for name, directory in self.directories.items():
                counted = {"segment files": float(num_segments(directory))} if name == "store" else {}
                self.samples_of(f"files of {name}").add(at_s, disk_mb=disk_mb(directory), **counted)
            await asyncio.sleep(SAMPLE_S)

    def samples_of(self, name: str) -> Samples:
        minutes = self.args.warm_up_minutes
        return self.samples.setdefault(name, Samples(warm_up_s=None if minutes is None else 60 * minutes))

    async def save(self) -> None:
        while True:
            await asyncio.sleep(SAVE_S)
            # On a busy machine a router may take longer to report its status than the time limit allows.
            with contextlib.suppress(AntefixError):
                await self.report()

    def living(self) -> list[RoleProcess]:
        return [process for process in self.steady.values() if process.alive]

    @property
    def directories(self) -> dict[str, Path]:
        config = self.deployment.config
        return {"store": config.store_dir, "ledger": config.ledger_dir, "logs": config.data_dir / "logs"}

    async def report(self) -> dict[str, Any]:
        """The result so far, which is also written to --out."""
        tally, status = self.tally, await self.client.status()
        counters = status.counters
        num_routed = counters.led + counters.straight
        shares = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
        ttft = {name: round(float(np.quantile(tally.ttft_s, at)), 3) for name, at in shares.items() if tally.ttft_s}
        router_s = cpu_s(self.steady["router"].process.pid) - self.cpu_before_s
        result = {
            "minutes": round((time.monotonic() - self.started) / 60, 1),
            "warm_up_minutes": self.args.warm_up_minutes,
            "store_mb_max": round(parse_byte_size(self.args.store_bytes) / 1e6, 2),
            "requests": {
                name: getattr(tally, f"num_{name}") for name in ("done", "wrong", "stuck", "cancelled", "kills")
            },
            "errors": tally.errors,
            "wrong": tally.wrong[:5],
            "token_hit_rate": round(tally.hit_tokens / max(1, tally.prompt_tokens), 4),
            "output_tokens": tally.output_tokens,
            "ttft_s": ttft,
            "counters": dataclasses.asdict(counters),
            "coalesced_share": round(counters.followed / max(1, num_routed), 4),
            "router_cpu_ms_per_request": round(1000 * router_s / max(1, num_routed), 2),
            "threads": {process.role: num_threads(process.process.pid) for process in self.living()},
            "load_left": sum(worker.num_requests for worker in status.workers),
            "growth": {name: samples.figures() for name, samples in self.samples.items()},
            "grew": sorted(name for name, samples in self.samples.items() if not samples.is_flat),
        }
        if self.args.out:
            self.args.out.write_text(json.dumps({**about("grpcio", "torch"), **result}, indent=1) + "\n")
        return result


def playable(path: Path, rng: random.Random, num_max: int) -> Iterator[list[Tokens]]:
    """The trace's conversations, repeated endlessly in random order, each time with different tokens.

    num_max: tokens of the longest prompt; longer ones are left out.
    """
    sessions: dict[str, list[TraceRequest]] = {}
    for request in load(path, "claude-code", block_size=64).requests:
        sessions.setdefault(request.session, []).append(request)
    system = np.random.default_rng(0).integers(0, 256, SYSTEM_TOKENS).astype(np.uint32)
    for salt in range(1 << 30):
        for session in rng.sample(sorted(sessions), len(sessions)):
            found = [tokens_of(request, salt, system) for request in sessions[session]]
            yield [prompt for prompt in found if len(prompt) <= num_max]


def tokens_of(request: TraceRequest, salt: int, system: Tokens) -> Tokens:
    """One token for each hash, so that equal prefixes stay equal."""
    mixed = (request.names.astype(np.uint64) + np.uint64(salt)) * np.uint64(0x9E3779B97F4A7C15)
    own = (mixed >> np.uint64(56)).astype(np.uint32)
    return np.concatenate((system, own, np.array([len(own) % 256], np.uint32)))


async def soak(args: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    workers = ("--pool-bytes", args.pool_bytes)
    flags = {"prefill": workers, "decode": workers, "kvstore": ("--budget-bytes", args.store_bytes)}
    config = DeploymentConfig(model=MODEL, data_dir=scratch / "data", extra_flags=flags)
    deployment = Deployment(config)
    try:
        run = Soak(args, deployment)
        await run.start()
        await run.run()
        while True:
            with contextlib.suppress(AntefixError):
                return await run.report()
    finally:
        await deployment.stop()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--warm-up-minutes", type=float, help="time after which nothing may grow; default: half")
    parser.add_argument("--trace", type=Path, default=ROOT.parent / "shared/traces/claude_code_80.jsonl.gz")
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument(
        "--think-s", type=float, default=15.0, help="mean pause of a client in seconds before each request"
    )
    parser.add_argument(
        "--twins",
        type=float,
        default=0.15,
        help="share of requests of which several identical copies are sent at the same time",
    )
    parser.add_argument(
        "--prompt-tokens-max",
        type=int,
        default=PROMPT_TOKENS_MAX,
        help="longer prompts of the trace are left out",
    )
    parser.add_argument("--bursts", type=int, default=0, help="bursts of requests at the start, one after the other")
    parser.add_argument("--burst-requests", type=int, default=32, help="requests that a burst sends at once")
    parser.add_argument("--cancels", type=float, default=0.1, help="share of requests that the client cancels early")
    parser.add_argument("--kill-every-s", type=float, default=90.0)
    parser.add_argument(
        "--kill-store",
        action="store_true",
        help="also kill the store's process; the memory use of the store is then not recorded",
    )
    parser.add_argument("--max-tokens", type=int, default=16)
    parser.add_argument(
        "--pool-bytes", default="64M", help="size of each worker's block pool (small, so that the pool is full early)"
    )
    parser.add_argument("--store-bytes", default="128M", help="size of the store (small, so that the store evicts)")
    parser.add_argument("--fill-store", action="store_true", help="fill the store before the first request")
    parser.add_argument("--ttl-divisor", type=float, default=1.0, help="number by which all times to live are divided")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="antefix-soak-") as scratch:
        result = asyncio.run(soak(args, Path(scratch)))
    sys.stdout.write(json.dumps(result, indent=1) + "\n")
    return 1 if result["requests"]["wrong"] or result["requests"]["stuck"] else 0


if __name__ == "__main__":
    sys.exit(main())
