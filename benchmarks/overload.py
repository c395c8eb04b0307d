"""What happens to a deployment on two cores under more load than it can serve, and with many idle connections?

    python -m benchmarks.overload --json benchmarks/results/overload.json --plot docs/results/overload.svg
    python -m benchmarks.overload --only rates --seconds 60

    rates     the highest rate with bounded p99, 2 and 10 times that, and the first rate again: goodput, p99, refused
    idle      10,000 connections that send nothing, with short requests at the same time
    readers   64 long streams, half of whose clients do not read, with short requests at the same time
    long      a prompt of --long-tokens among short ones: the short ones' p99 with and without it
    tenants   a greedy tenant (32 requests at once) and a modest one (1 at a time): the modest one's p99 with and
              without the greedy tenant

Only ratios within one run are meaningful; absolute figures need an idle machine. Requests are short HTTP completions.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import itertools
import os
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any

import httpx2
import numpy as np

from antefix_console.deployment import Deployment, DeploymentConfig
from benchmarks.load_client import LoadClient
from benchmarks.load_outcome import Outcome, back
from benchmarks.other_load import OtherLoad
from benchmarks.run_record import write

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "models" / "antefix-tiny"
TEXT = (ROOT / "LICENSE").read_text()
KEYS = {"greedy": "greedy-key", "modest": "modest-key"}
# An answer after this time does not count, because the client has left by then.
PATIENCE_S = 30.0
# Two tenants with equal shares get half of each worker: 2 times the time alone. Three processes share two cores, and a
# request waits once per worker for the call that is running, so up to 3 times counts as an equal share.
_SHARE_MAX = 3.0
# More than this, and the figures are no longer those of the services.
_OTHERS = "cores that other programs used"
_OTHERS_MAX = 0.1
_EQUAL_SHARE = f"2 is an equal share; {_SHARE_MAX:g} or less"


class Door:
    """The router's HTTP address under test."""

    def __init__(self, url: str, pids: Callable[[], Iterable[int]] = tuple) -> None:
        """pids: returns the processes behind the door."""
        self.url = url
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
        # The HTTP library is used for streams only.
        self.client = httpx2.AsyncClient(base_url=url, timeout=PATIENCE_S, limits=limits)
        host, _, port = url.removeprefix("http://").rpartition(":")
        self.load = LoadClient(host, int(port))
        self.other_load = OtherLoad(lambda: (os.getpid(), *pids()))
        self._numbers = itertools.count()

    async def ask(
        self,
        outcome: Outcome,
        *,
        tenant: str = "modest",
        text: str = "",
        max_tokens: int = 4,
        patience_s: float | None = PATIENCE_S,
    ) -> None:
        number = next(self._numbers)
        # Numbers of equal length: otherwise later prompts would be longer, and their outputs would end one more block.
        prompt = text or f"{number:06} " + TEXT[(at := number * 37 % (len(TEXT) - 200)) : at + 120]
        body = {"model": "antefix-tiny", "prompt": prompt, "max_tokens": max_tokens}
        begun = time.monotonic()
        try:
            async with asyncio.timeout(patience_s):
                status = await self.load.post("/v1/completions", body, key_of(tenant))
        except (OSError, EOFError, ValueError):
            status = 0
        outcome.note(begun, status)

    async def at_rate(self, per_s: float, seconds: float, **more: Any) -> Outcome:
        """Send requests at fixed times, whether or not earlier ones were answered, and wait for all answers."""
        outcome, left = await self.send(per_s, seconds, **more)
        await asyncio.gather(*left)
        return outcome

    async def send(self, per_s: float, seconds: float, **more: Any) -> tuple[Outcome, set[asyncio.Task[None]]]:
        """As `at_rate`, but returns when all requests were sent, with those that are not answered yet."""
        outcome, cpu = Outcome(), time.process_time()
        self.other_load.lap_s()
        tasks: set[asyncio.Task[None]] = set()
        for number in range(round(per_s * seconds)):
            await asyncio.sleep(max(0.0, outcome.begun + number / per_s - time.monotonic()))
            tasks.add(task := asyncio.create_task(self.ask(outcome, **more)))
            task.add_done_callback(tasks.discard)
        await asyncio.sleep(max(0.0, outcome.begun + seconds - time.monotonic()))
        outcome.seconds = time.monotonic() - outcome.begun
        outcome.client_cpu_s = time.process_time() - cpu
        outcome.other_cpu_s = self.other_load.lap_s()
        return outcome, set(tasks)

    async def in_turn(self, seconds: float, num_clients: int = 1, **more: Any) -> Outcome:
        """Run clients that send the next request when the last one is answered."""
        outcome, begun, cpu = Outcome(), time.monotonic(), time.process_time()
        self.other_load.lap_s()

        async def client() -> None:
            while time.monotonic() < begun + seconds:
                await self.ask(outcome, **more)

        await asyncio.gather(*(client() for _ in range(num_clients)))
        outcome.seconds = time.monotonic() - begun
        outcome.client_cpu_s = time.process_time() - cpu
        outcome.other_cpu_s = self.other_load.lap_s()
        return outcome


def key_of(tenant: str) -> dict[str, str]:
    return {"authorization": f"Bearer {KEYS[tenant]}"}


async def rates(door: Door, args: argparse.Namespace) -> dict[str, Any]:
    """Measure the peak of closed-loop clients, the highest rate whose p99 is within --p99-factor of the idle median,
    and overload. After an overload, the highest rate follows at once, while answers to the overload are still to come.
    """
    idle = await door.in_turn(args.seconds / 4)
    bound_s = args.p99_factor * float(np.quantile(idle.latencies_s, 0.5))
    peak = await door.in_turn(args.seconds, num_clients=16)
    rows: dict[str, Any] = {"idle": idle.figures(), "peak": peak.figures(), "p99_bound_ms": round(1000 * bound_s)}
    found, before = await highest(door, len(peak.latencies_s) / peak.seconds, bound_s, args.seconds)
    rows["highest"] = before.figures()
    for factor in (2, 10):
        over, left = await door.send(factor * found, args.seconds)
        after = await door.at_rate(found, args.seconds)
        await asyncio.gather(*left)
        rows[f"times_{factor}"] = over.figures()
        rows[f"after_times_{factor}"] = {**after.figures(), "back_after_s": back(after, 1.1 * before.p99_s)}
    best = max(rows[name]["goodput_per_s"] for name in ("peak", "highest", "times_2", "times_10"))
    for factor in (2, 10):
        rows[f"goodput_of_peak_times_{factor}"] = round(rows[f"times_{factor}"]["goodput_per_s"] / best, 3)
    return rows


async def highest(door: Door, peak_per_s: float, bound_s: float, seconds: float) -> tuple[float, Outcome]:
    """The highest rate at which every request gets an answer and the p99 is at most `bound_s`. peak_per_s: the rate of
    closed-loop clients, of which shares are tried.
    """

    async def tried(share: float) -> tuple[float, Outcome, bool]:
        outcome = await door.at_rate(share * peak_per_s, seconds)
        is_bounded = outcome.p99_s <= bound_s and outcome.statuses[200] == outcome.statuses.total()
        return share * peak_per_s, outcome, is_bounded

    for share in (0.9, 0.75, 0.6, 0.45, 0.3):
        rate, outcome, is_bounded = await tried(share)
        if is_bounded:
            break
    if share == 0.9:
        for more in (1.05, 1.2, 1.35):
            higher = await tried(more)
            if not higher[2]:
                break
            rate, outcome, _ = higher
    return rate, outcome


async def idle(door: Door, args: argparse.Namespace) -> dict[str, Any]:
    """Connections that send nothing, and requests at the same time."""
    without = await door.in_turn(args.seconds)
    host, _, port = door.url.removeprefix("http://").rpartition(":")
    held, refused = [], 0
    for _ in range(args.idle):
        try:
            held.append(await asyncio.open_connection(host, int(port)))
        except OSError:
            refused += 1
    during = await door.in_turn(args.seconds)
    for _, writer in held:
        writer.close()
    return {"connections": len(held), "not_connected": refused, **compared(without, during)}


async def readers(door: Door, args: argparse.Namespace) -> dict[str, Any]:
    """Long streams, of which clients read only every second one, and requests at the same time. A refused stream is
    asked for again after the time that the server said.
    """
    without = await door.in_turn(args.seconds)
    seen: Counter[str] = Counter()
    streams = [asyncio.create_task(stream(door, seen, sleeps=bool(number % 2))) for number in range(args.streams)]
    await asyncio.sleep(2.0)
    during = await door.in_turn(args.seconds)
    num_ended = sum(task.done() for task in streams)
    for task in streams:
        task.cancel()
    ended = await asyncio.gather(*streams, return_exceptions=True)
    failed = sum(isinstance(each, Exception) and not isinstance(each, asyncio.CancelledError) for each in ended)
    counts = {"begun": seen["begun"], "refusals": seen["refusals"], "ended_meanwhile": num_ended, "failed": failed}
    return {"streams": len(streams), **counts, **compared(without, during)}


async def stream(door: Door, seen: Counter[str], *, sleeps: bool) -> None:
    """Read one stream to its end; if it sleeps, only the first line. seen: counts streams with a line, and refusals."""
    body = {"model": "antefix-tiny", "prompt": TEXT[:300], "max_tokens": 4000, "stream": True, "ignore_eos": True}
    while True:
        async with door.client.stream(
            "POST", "/v1/completions", json=body, headers=key_of("greedy"), timeout=None
        ) as answer:
            if answer.status_code == 429:
                seen["refusals"] += 1
                retry_s = float(answer.headers["retry-after"])
            else:
                answer.raise_for_status()
                num = 0
                async for line in answer.aiter_lines():
                    num += line.startswith("data:")
                    seen["begun"] += num == 1 and line.startswith("data:")
                    if sleeps and num:
                        await asyncio.sleep(3600)
                return
        await asyncio.sleep(retry_s)


async def long(door: Door, args: argparse.Namespace) -> dict[str, Any]:
    """A prompt that takes minutes, and short prompts at the same time."""
    without = await door.in_turn(args.seconds)
    text = TEXT * (args.long_tokens // len(TEXT) + 1)
    outcome = Outcome()
    text = text[: args.long_tokens]
    asking = asyncio.create_task(door.ask(outcome, tenant="greedy", text=text, max_tokens=1, patience_s=None))
    await asyncio.sleep(1.0)
    during = await door.in_turn(args.seconds)
    was_running = not asking.done()
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    refused = dict(outcome.statuses) if not was_running else {}
    return {
        "long_tokens": args.long_tokens,
        "was_running": was_running,
        "ended_with": refused,
        **compared(without, during),
    }


async def tenants(door: Door, args: argparse.Namespace) -> dict[str, Any]:
    """A greedy tenant sends 32 requests at a time, and a modest one sends one at a time."""
    without = await door.in_turn(args.seconds)
    greedy = asyncio.create_task(door.in_turn(args.seconds + 2, num_clients=32, tenant="greedy"))
    await asyncio.sleep(2.0)
    during = await door.in_turn(args.seconds)
    return {"greedy": (await greedy).figures(), **compared(without, during)}


def compared(without: Outcome, during: Outcome) -> dict[str, Any]:
    return {
        "without": without.figures(),
        "with": during.figures(),
        "p99_with_to_without": round(during.p99_s / without.p99_s, 2) if during.latencies_s else None,
    }


PARTS: dict[str, Callable[[Door, argparse.Namespace], Awaitable[dict[str, Any]]]] = {
    "rates": rates,
    "idle": idle,
    "readers": readers,
    "long": long,
    "tenants": tenants,
}


@contextlib.asynccontextmanager
async def deployed(args: argparse.Namespace, scratch: Path) -> AsyncIterator[Door]:
    book = scratch / "tenants.toml"
    tables = (
        f'[[tenant]]\nname = "{name}"\napi_key_sha256 = ["{hashlib.sha256(key.encode()).hexdigest()}"]\n'
        for name, key in KEYS.items()
    )
    book.write_text("".join(tables))
    pool = ("--pool-bytes", args.pool_bytes)
    config = DeploymentConfig(
        model=MODEL,
        data_dir=scratch / "data",
        http_address="127.0.0.1:0",
        tenants_file=str(book),
        extra_flags={"prefill": pool, "decode": pool},
        grace_s=5,
    )
    async with Deployment(config) as deployment:
        url = f"http://{deployment.one('router').http_address}"
        door = Door(url, lambda: [each.process.pid for each in deployment.processes])
        yield door
        door.load.close()
        await door.client.aclose()


async def measure(args: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in args.only or PARTS:
        # Each part gets a new deployment, so that leftover work of one part is no load on the next.
        (directory := scratch / name).mkdir()
        async with deployed(args, directory) as door:
            await door.in_turn(2.0)
            found[name] = await PARTS[name](door, args)
            print(name, found[name], file=sys.stderr, flush=True)
    return found


def verdicts(found: dict[str, Any]) -> list[str]:
    """For each part of the benchmark: the goal, the measured figure, and whether the figure meets the goal."""
    rows: list[tuple[str, Any, str, bool]] = []
    if part := found.get("rates"):
        most = max(row["others_cpu"] for row in part.values() if isinstance(row, dict))
        rows.append((f"{_OTHERS}, the most in any stretch", most, f"{_OTHERS_MAX:g} or less", most <= _OTHERS_MAX))
        for factor in (2, 10):
            share = part[f"goodput_of_peak_times_{factor}"]
            back_s = part[f"after_times_{factor}"]["back_after_s"]
            rows.append((f"goodput at {factor} times the rate, of its peak", share, "0.9 or more", share >= 0.9))
            rows.append(("seconds until p99 is back", back_s, "10 or less", back_s is not None and back_s <= 10))
    if part := found.get("idle"):
        ratio = part["p99_with_to_without"] or float("inf")
        rows.append(("idle connections that were not accepted", part["not_connected"], "0", not part["not_connected"]))
        rows.append(("p99 next to idle connections, to without", ratio, "2 or less", ratio <= 2))
    if part := found.get("long"):
        ratio, ran = part["p99_with_to_without"] or float("inf"), part["was_running"]
        rows.append(("the long prompt was being computed until the end", ran, "True", ran))
        rows.append(("p99 next to a long prompt, to without", ratio, "2 or less", ratio <= 2))
    if part := found.get("readers"):
        ended, failed = part["ended_meanwhile"], part["failed"]
        ratio = part["p99_with_to_without"] or float("inf")
        rows.append(("streams that failed", failed, "0", not failed))
        rows.append(("streams that ended meanwhile", ended, "fewer than half", 2 * ended < part["streams"]))
        rows.append(("p99 next to long streams of one tenant, to without", ratio, _EQUAL_SHARE, ratio <= _SHARE_MAX))
    if part := found.get("tenants"):
        ratio = part["p99_with_to_without"] or float("inf")
        rows.append(("p99 of a modest tenant, to without", ratio, _EQUAL_SHARE, ratio <= _SHARE_MAX))
    return [f"{what}: {value} (wanted: {wanted}): {'met' if met else 'NOT met'}" for what, value, wanted, met in rows]


def plot(found: dict[str, Any], path: Path) -> None:
    """Plot the offered rate, the answered rate, and p99 by offered rate."""
    from matplotlib.figure import Figure

    names = ("highest", "times_2", "times_10")
    rows = [found["rates"][name] for name in names]
    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axis = figure.add_subplot()
    axis.plot(
        [row["asked_per_s"] for row in rows], [row["goodput_per_s"] for row in rows], "o-", label="answered per s"
    )
    axis.set(xlabel="asked per s", ylabel="answered per s", ylim=(0, 1.1 * max(row["goodput_per_s"] for row in rows)))
    other = axis.twinx()
    other.plot(
        [row["asked_per_s"] for row in rows], [row["p99_ms"] for row in rows], "s--", color="C1", label="p99, ms"
    )
    other.set(ylabel="p99 of answers, ms", ylim=(0, 1.1 * max(row["p99_ms"] for row in rows)))
    figure.legend(loc="outside upper center", ncols=2)
    figure.savefig(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=tuple(PARTS))
    parser.add_argument("--seconds", type=float, default=30.0, help="seconds of each stretch")
    parser.add_argument(
        "--p99-factor",
        type=float,
        default=5.0,
        help="a p99 counts as bounded up to this factor times the median of the unloaded run",
    )
    parser.add_argument("--idle", type=int, default=10_000)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--long-tokens", type=int, default=1_000_000)
    parser.add_argument("--pool-bytes", default="1G")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    with tempfile.TemporaryDirectory(prefix="antefix-overload-") as scratch:
        found = asyncio.run(measure(args, Path(scratch)))
    if args.plot and "rates" in found:
        plot(found, args.plot)
    found["verdicts"] = verdicts(found)
    if args.json:
        write(args.json, found, "grpcio", "torch", "uvicorn")
    print(found)
    print("\n".join(found["verdicts"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
