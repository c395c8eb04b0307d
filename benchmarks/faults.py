"""Do answers stay right when real processes, links and files fail, and how soon does service recover?

    python -m benchmarks.faults --rounds 1 --seed 1 --json benchmarks/results/faults.json
    python -m benchmarks.faults --only 'stop' --rounds 3         # faults whose name has this
    python -m benchmarks.faults --small-disk 96M --faketime      # as root, with libfaketime: disks, mounts, clocks
    python -m benchmarks.faults --clients 16 --pause-s 0         # under as much load as two cores can take
    python -m benchmarks.faults --redis --trace                  # Redis has checkpoints and the bill; agents' prompts
    python -m benchmarks.faults --quick --rounds 5 --minutes 8 --clients 1 --json FILE     # recovery times, by fault

The benchmark runs one supervised deployment, as `antefix up` does, with the roles behind proxies. Clients play
conversations that continue and repeat earlier prompts, or the conversations of an agents' trace. Faults happen one
after the other. --seed fixes their order and all prompts. Each answer is compared with a run of the bare model, without
store and without faults. A request without an answer must get a clear error. A fault's recovery is the time from the
fault's beginning until a request that was sent after the beginning is answered. This recovery time should be compared
with the time of an undisturbed request. At the end the ledger must have one record for each answer, in which hit
tokens plus miss tokens equal the prompt.

Before each fault all roles run, and the router may send requests to all workers, so that no fault meets what the fault
before it left. After each round the answers so far are compared, and --json gets the report so far, so that a run that
is ended keeps its rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from antefix.clients import RouterClient
from antefix.errors import AntefixError, InternalError
from antefix.layout import KVFormat
from antefix.sampling import Sampling
from antefix.window_pool import DISK
from antefix_console.bare_model import Reference
from antefix_console.deployment import DeploymentConfig
from antefix_console.supervise import Supervisor
from benchmarks.fault_kinds import CLOCK_FAULTS, FAULTS, LASTS_S, MORE_FAULTS, REDIS_FAULTS, Fault, clock_file
from benchmarks.fault_links import LinkedDeployment
from benchmarks.fault_reports import Tally, added, bill, earlier, summed_up
from benchmarks.run_record import write
from benchmarks.soak import PROMPT_TOKENS_MAX, playable
from tests.redis_servers import RedisServer

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "models" / "antefix-tiny"
FAKETIME = "/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1"
Tokens = npt.NDArray[np.uint32]
# This limit is longer than the longest wait that the design allows.
STUCK_S = 60.0
RECOVERY_S_MAX = 120.0
WHOLE_S_MAX = 90.0
SETTLE_S, QUICK_SETTLE_S = 1.0, 0.2
# With --quick, a lasting fault ends soon after the first answer.
QUICK_LASTS_S = 0.3
# Longest prompt that is taken from a trace, so that two cores answer it within a second.
TRACE_TOKENS_MAX = 900


class Campaign:
    """One run over one deployment."""

    def __init__(
        self,
        args: argparse.Namespace,
        deployment: LinkedDeployment,
        faults: dict[str, Fault],
        prompts: Iterator[Tokens],
        save: Callable[[], None],
    ) -> None:
        """save: called after each round."""
        self.args, self.deployment, self.faults, self.save = args, deployment, faults, save
        self.tally = Tally()
        self.rng = random.Random(args.seed)
        self.reference = Reference(MODEL, KVFormat.FP8)
        self._num_roles = len(deployment.processes)
        self._known: dict[bytes, list[int]] = {}
        # Cleared while answers are checked, because that would take processor time from the deployment.
        self._may_ask = asyncio.Event()
        self._may_ask.set()
        self.answered_ids: list[str] = []
        self._answers: list[tuple[Tokens, list[int]]] = []
        # While the bill's Redis is away, routers refuse ids that they do not know, which is no failure to recover.
        self._ids = iter("" if args.redis else f"fault-{args.seed}-{number}" for number in range(1 << 30))
        self.prompts = prompts

    async def run(self) -> None:
        """Run all faults --rounds times, each round in a different order. None begins after --minutes."""
        clients = [asyncio.create_task(self._play()) for _ in range(self.args.clients)]
        try:
            for _ in range(self.args.undisturbed):
                begun = time.monotonic()
                if (answered_at := await self._ask(next(self.prompts))) is not None:
                    self.tally.undisturbed_s.append(answered_at - begun)
            ends = time.monotonic() + 60 * self.args.minutes
            for number in range(self.args.rounds):
                print(f"round {number + 1} of {self.args.rounds}", file=sys.stderr, flush=True)
                await self._round(ends)
                if time.monotonic() > ends:
                    break
        finally:
            for client in clients:
                client.cancel()
            await asyncio.gather(*clients, return_exceptions=True)

    async def _round(self, ends: float) -> None:
        """Each fault once, then the comparison of the answers, and the report so far."""
        begun = time.monotonic()
        for number, name in enumerate(self.rng.sample(sorted(self.faults), len(self.faults)), start=1):
            if time.monotonic() > ends:
                break
            await self._whole()
            await self._fault(name)
            left_s = (time.monotonic() - begun) / number * (len(self.faults) - number)
            print(f"  {number} of {len(self.faults)}; {left_s:.0f} s left", file=sys.stderr, flush=True)
        self._may_ask.clear()
        await asyncio.to_thread(self.check)
        self.save()
        self._may_ask.set()

    async def _whole(self) -> None:
        """Wait until all roles run and the router may send requests to all workers, at most WHOLE_S_MAX."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(WHOLE_S_MAX):
                while not await self._is_whole():  # noqa: ASYNC110 - other processes' state
                    await asyncio.sleep(0.1)
        await asyncio.sleep(QUICK_SETTLE_S if self.args.quick else SETTLE_S)

    async def _is_whole(self) -> bool:
        serving = [process for process in self.deployment.processes if process.serves]
        if len(serving) < self._num_roles:
            return False
        try:
            async with RouterClient(self.deployment.one("router").address) as client:
                status = await client.status()
        except (AntefixError, StopIteration):
            return False
        num_workers = sum(process.role in ("prefill", "decode") for process in serving)
        return sum(worker.serving for worker in status.workers) >= num_workers

    async def _fault(self, name: str) -> None:
        begun = time.monotonic()
        async with self.faults[name](self.deployment, self.rng):
            while (answered_at := await self._ask(next(self.prompts))) is None:
                if time.monotonic() - begun > RECOVERY_S_MAX:
                    self.tally.not_recovered.append(name)
                    break
                await asyncio.sleep(0.1)
            else:
                self.tally.recovery_s.setdefault(name, []).append(answered_at - begun)
        print(f"{name}: {time.monotonic() - begun:.1f} s", file=sys.stderr, flush=True)

    async def _play(self) -> None:
        while True:
            await self._may_ask.wait()
            await self._ask(next(self.prompts))
            await asyncio.sleep(self.rng.uniform(0.0, self.args.pause_s))

    async def _ask(self, prompt: Tokens) -> float | None:
        """Send a request. Returns the time at which the answer came, or None if there was no answer."""
        output: list[int] = []
        billed_as = ""
        try:
            # Make a new client each time, because an operator's client does not survive a restart of the router.
            router = self.deployment.one("router").address
            async with asyncio.timeout(STUCK_S), RouterClient(router) as client:
                sampling = Sampling(max_tokens=self.args.max_tokens)
                asked = client.generate(prompt, sampling, request_id=next(self._ids), timeout_s=STUCK_S - 5)
                async for message in asked:
                    output += [int(token) for token in message.tokens]
                    billed_as = message.request_id or billed_as
        except TimeoutError:
            self.tally.num_stuck += 1
            return None
        except (AntefixError, StopIteration) as err:
            self.tally.errors[type(err).__name__] += 1
            self.tally.num_unclear += isinstance(err, InternalError)
            return None
        self._answers.append((prompt, output))
        self.answered_ids.append(billed_as)
        return time.monotonic()

    def check(self) -> None:
        """Compare the answers since the last call with runs of the bare model."""
        answers, self._answers = self._answers, []
        for prompt, output in answers:
            key = prompt.tobytes()
            if key not in self._known:
                self._known[key] = self.reference.generate(prompt, self.args.max_tokens)
            self.tally.num_checked += 1
            if output != self._known[key]:
                self.tally.num_wrong += 1
                self.tally.wrong.append({"prompt": prompt.tolist(), "output": output, "expected": self._known[key]})


def conversations(rng: random.Random, *, num_max: int = 900) -> Iterator[Tokens]:
    """Prompts that share prefixes, continue, and repeat: parts of a text after one of a few system prompts.

    num_max: tokens from which a prompt is not continued; a new one has at most 5/8 of them.
    """
    system_tokens, own_max = num_max * 26 // 90, num_max // 3
    text = np.frombuffer((ROOT / "LICENSE").read_bytes(), np.uint8).astype(np.uint32)
    asked: list[Tokens] = []
    while True:
        if asked and rng.random() < 0.4:
            prompt = rng.choice(asked)
            if rng.random() < 0.7 and len(prompt) < num_max:
                start = rng.randrange(len(text) - 200)
                prompt = np.concatenate((prompt, text[start : start + rng.randrange(20, own_max // 2)]))
        else:
            system, start = rng.randrange(4) * 500, rng.randrange(len(text) - 400)
            prompt = np.concatenate(
                (text[system : system + system_tokens], text[start : start + rng.randrange(20, own_max)])
            )
        asked = [*asked[-30:], prompt]
        yield prompt


def from_trace(path: Path, rng: random.Random) -> Iterator[Tokens]:
    """The conversations of an agents' trace, one after the other."""
    for prompts in playable(path, rng, PROMPT_TOKENS_MAX):
        yield from (prompt for prompt in prompts if len(prompt) <= TRACE_TOKENS_MAX)


def report(campaign: Campaign, supervisor: Supervisor, minutes: float) -> dict[str, Any]:
    """What a run counted and timed. `joined` adds the report of another run, and `summed_up` makes the percentiles."""
    tally = campaign.tally
    return {
        "seed": campaign.args.seed,
        "minutes": round(minutes, 1),
        "clients": campaign.args.clients,
        "faults": sum(map(len, tally.recovery_s.values())) + len(tally.not_recovered),
        "answers_checked": tally.num_checked,
        "wrong": tally.num_wrong,
        "stuck": tally.num_stuck,
        "errors": dict(tally.errors),
        "unclear_errors": tally.num_unclear,
        "not_recovered": tally.not_recovered,
        "restarts": supervisor.num_restarts,
        "manual_steps": 0,
        "undisturbed_s": [round(seconds, 2) for seconds in tally.undisturbed_s],
        "recovery_s": {name: [round(each, 2) for each in found] for name, found in tally.recovery_s.items()},
        "bill": bill(campaign.deployment.config.ledger_dir, campaign.answered_ids),
        "wrong_answers": tally.wrong[:3],
    }


async def campaign(args: argparse.Namespace, scratch: Path, keep: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    """keep: takes the report so far, after each round."""
    known = FAULTS | (MORE_FAULTS if args.small_disk else {}) | (CLOCK_FAULTS if args.faketime else {})
    known |= REDIS_FAULTS if args.redis else {}
    redis = RedisServer(scratch) if args.redis else None
    rng = random.Random(args.seed + 1)
    prompts = from_trace(args.trace, rng) if args.trace else conversations(rng, num_max=300 if args.quick else 900)
    # Reading the trace takes seconds, in which the proxies of this process would pass nothing on.
    prompts = itertools.chain([next(prompts)], prompts)
    faults = {name: fault for name, fault in known.items() if any(text in name for text in args.only)}
    pool = ("--pool-bytes", "64M")
    flags: dict[str, tuple[str, ...]] = {"prefill": pool, "decode": pool, "kvstore": ("--budget-bytes", "64M")}
    config = DeploymentConfig(
        model=MODEL,
        data_dir=scratch / "data",
        num_decode=2,
        extra_flags=flags,
        grace_s=10,
        window_pool=redis.url if redis else DISK,
        bill_redis=redis.url if redis else "",
    )
    if args.faketime:
        clock_file(config.data_dir).write_text("+0")
        # All roles get the same clock steps; only this process keeps the true clock.
        os.environ |= {
            "LD_PRELOAD": FAKETIME,
            "FAKETIME_TIMESTAMP_FILE": str(clock_file(config.data_dir)),
            "FAKETIME_CACHE_DURATION": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        }
    deployment = LinkedDeployment(config, redis, lasts_s=QUICK_LASTS_S if args.quick else LASTS_S)
    supervisor = Supervisor(deployment, lambda text: print(text, file=sys.stderr, flush=True))
    try:
        if redis is not None:
            await asyncio.to_thread(redis.start)
        await deployment.start()
        begun = time.monotonic()

        def save() -> None:
            keep(report(run, supervisor, (time.monotonic() - begun) / 60))

        run = Campaign(args, deployment, faults, prompts, save)
        supervising = asyncio.create_task(supervisor.run())
        running = asyncio.create_task(run.run())
        await asyncio.wait({supervising, running}, return_when=asyncio.FIRST_COMPLETED)
        for task in (running, supervising):
            task.cancel()
        ended = await asyncio.gather(running, supervising, return_exceptions=True)
        for err in ended:
            if isinstance(err, Exception):
                run.tally.not_recovered.append(repr(err))
        minutes = (time.monotonic() - begun) / 60
        await deployment.stop()
        await asyncio.to_thread(run.check)
        return report(run, supervisor, minutes)
    finally:
        await deployment.stop()
        await deployment.close_links()
        if redis is not None:
            redis.kill()


@contextlib.contextmanager
def small_disk(size: str, directory: Path) -> Iterator[None]:
    if not size:
        yield
        return
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(directory)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(directory)], check=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1, help="how often each fault comes")
    parser.add_argument("--minutes", type=float, default=60.0, help="time after which no more faults begin")
    parser.add_argument(
        "--seed", type=int, default=1, help="seed of the prompts, and of the order and place of the injected faults"
    )
    parser.add_argument(
        "--only", nargs="+", default=[""], metavar="TEXT", help="inject only faults whose name contains one of these"
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="many recovery times in a few minutes: short prompts, and a fault ends soon after the first answer",
    )
    parser.add_argument("--clients", type=int, default=2)
    parser.add_argument(
        "--pause-s", type=float, default=0.5, help="longest time that a client waits between two requests"
    )
    parser.add_argument(
        "--undisturbed",
        type=int,
        default=10,
        help="number of requests before the first fault, as the baseline of the comparison",
    )
    parser.add_argument("--max-tokens", type=int, default=12)
    parser.add_argument(
        "--small-disk", default="", metavar="SIZE", help="keep all files on a tmpfs of this size (needs root)"
    )
    parser.add_argument(
        "--faketime",
        action="store_true",
        help="also move the clocks of the services forward and back (with libfaketime)",
    )
    parser.add_argument(
        "--redis", action="store_true", help="keep checkpoints and the bill in a Redis server, which fails as well"
    )
    parser.add_argument(
        "--trace", type=Path, help="play the conversations of this agents' trace (Claude Code's format)"
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--add", action="store_true", help="add to what --json has already, such as another seed's run")
    args = parser.parse_args()
    before = earlier(args.json, args.clients) if args.add else None

    def keep(found: dict[str, Any]) -> dict[str, Any]:
        result = summed_up(found if before is None else added(before, found))
        if args.json:
            write(args.json, result, "grpcio", "torch")
        return result

    with tempfile.TemporaryDirectory(prefix="antefix-faults-") as scratch, small_disk(args.small_disk, Path(scratch)):
        result = keep(asyncio.run(campaign(args, Path(scratch), keep)))
    print(result)
    bad = ("wrong", "stuck", "unclear_errors", "not_recovered")
    return int(
        any(result[name] for name in bad) or any(result["bill"][name] for name in ("double_billed", "not_billed"))
    )


if __name__ == "__main__":
    sys.exit(main())
