"""How much slower is a modest tenant's request while a greedy tenant uses the same worker, in processor time?

    python -m benchmarks.tenant_shares --json benchmarks/results/tenant_shares.json

One decode worker's engine and scheduler run in this process, with the tests' small model and a store in memory, without
network and router. Times are this process' processor time, so other load on the machine counts little. The modest
tenant sends one request after the other: a prompt that the worker prefills, and some output tokens. The other load is:

    alone     none
    streams   32 long outputs of a greedy tenant
    requests  32 requests of a greedy tenant at a time, each like the modest one's
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import statistics
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np

from antefix.layout import KVFormat
from antefix.sampling import Sampling
from antefix_decode import scheduler as decode_scheduler
from antefix_decode.scheduler import Running, Scheduler
from antefix_decode.stopping import Stopper
from antefix_decode.token_choice import Sampler
from antefix_prefill.record_writer import RecordWriter
from antefix_prefill.run_prompt import run_prompt
from antefix_prefill.worker.compute_thread import compute_for
from antefix_prefill.worker.engine import Engine
from benchmarks.run_record import write
from tests import engines

PROMPT_TOKENS, OUTPUT_TOKENS, NUM_GREEDY = 60, 5, 32
ENDLESS = 1500


class Worker:
    """One decode worker. num_answers: the number of answers to each tenant."""

    def __init__(self) -> None:
        self.engine: Engine = engines.build(
            engines.load(KVFormat.FP8), engines.MemoryStore(), strategy="boundary", num_blocks=2048, prefill_chunk=256
        )
        self.scheduler = Scheduler(self.engine, NUM_GREEDY, NUM_GREEDY)
        self.num_answers = {"modest": 0, "greedy": 0}
        self._rng = np.random.default_rng(1)

    async def ask(self, tenant: str, num_tokens: int = OUTPUT_TOKENS) -> float:
        """Send one request. Returns this process' processor seconds until the output's end."""
        begun = time.process_time()
        compute_for(tenant)
        async with self.scheduler.place(tenant) as place:
            prompt = engines.prompt_of(self.engine, self._rng.integers(0, 256, PROMPT_TOKENS))
            computed = await run_prompt(self.engine, prompt)
            sampling = Sampling(max_tokens=num_tokens, ignore_eos=True)
            sampler, stopper = Sampler(sampling), Stopper(sampling, frozenset())
            stopper.push(first := sampler.choose(computed.logits, prompt.num_tokens))
            running = Running(
                prompt=prompt,
                sequence=computed.sequence,
                sampler=sampler,
                stopper=stopper,
                writer=RecordWriter(self.engine.store, self.engine.counters),
                next_token=first,
                prompt_tokens=prompt.num_tokens,
                place=place,
            )
            self.scheduler.join(running)
            try:
                async for _ in self.scheduler.tokens(running):
                    pass
            finally:
                await self.scheduler.leave(running)
        self.num_answers[tenant] += 1
        return time.process_time() - begun

    async def keep_asking(self, num_tokens: int) -> None:
        while True:
            await self.ask("greedy", num_tokens)


async def stretch(worker: Worker, num_requests: int, greedy_tokens: int | None) -> list[float]:
    """Times of the modest tenant's requests next to a greedy tenant's.

    greedy_tokens: If `greedy` is None, the modest tenant's requests run alone.
    """
    num = NUM_GREEDY if greedy_tokens else 0
    greedy = [asyncio.create_task(worker.keep_asking(greedy_tokens or 0)) for _ in range(num)]
    while greedy and worker.scheduler.num_placed < NUM_GREEDY:  # noqa: ASYNC110 - of other tasks
        await asyncio.sleep(0.01)
    found = [await asyncio.create_task(worker.ask("modest")) for _ in range(num_requests)]
    for task in greedy:
        task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await asyncio.gather(*greedy, return_exceptions=True)
    return found


async def measure(num_requests: int) -> dict[str, Any]:
    worker = Worker()
    await stretch(worker, 3, None)
    found = {
        "alone": await stretch(worker, num_requests, None),
        "streams": await stretch(worker, num_requests, ENDLESS),
        "requests": await stretch(worker, num_requests, OUTPUT_TOKENS),
    }
    await worker.scheduler.close()
    worker.engine.compute.close()
    alone = statistics.median(found["alone"])
    return {
        name: {
            "p50_ms": round(1000 * statistics.median(times), 1),
            "max_ms": round(1000 * max(times), 1),
            "to_alone": round(statistics.median(times) / alone, 2),
        }
        for name, times in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--requests",
        type=int,
        default=12,
        help="number of requests that the modest tenant sends in each part of the run",
    )
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with mock.patch.object(decode_scheduler, "time", SimpleNamespace(perf_counter=time.process_time)):
        found = asyncio.run(measure(args.requests))
    print(found)
    if args.json:
        write(args.json, found, "torch")


if __name__ == "__main__":
    main()
