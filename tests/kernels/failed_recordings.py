"""On a GPU: does a recording that fails, or garbage that is collected during one, change what workers compute?

    python -m tests.kernels.failed_recordings --out results

Prompts of one token and of twenty are run, handed over to another worker, and continued by a token there. Each outcome
must have the bits of the first cold run: with recordings that work, with old graphs that become garbage while a step is
recorded, and after a recording that was made to fail. The last row repeats this with the code as it was before such
failures were mended, to show what the check finds. Writes failed_recordings.json after every row.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from antefix.model import load_model, step_runner
from antefix.model_dir import identify
from antefix_console.verify.compare import RunOutcome, compare
from antefix_console.verify.models import Subject
from antefix_console.verify.paired_runs import WorkerPair, cold_and_one_more, hand_over, run_cold
from antefix_console.verify.stores import MemoryStore
from antefix_prefill.worker.compute_thread import ComputeThread
from benchmarks import run_record
from tests.model import released_checkpoint as released

LENGTHS = (1, 20)


@contextlib.contextmanager
def during_recordings(act: Callable[[], object], after: Callable[[], object] = lambda: None) -> Iterator[None]:
    """Within this context every recording of several tokens begins with a call of `act` and ends with `after`."""
    plain = step_runner.run_rows

    def run_rows(*args: Any) -> Any:
        if not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
            return plain(*args)
        try:
            act()
            return plain(*args)
        finally:
            after()

    step_runner.run_rows = run_rows
    try:
        yield
    finally:
        step_runner.run_rows = plain


@contextlib.contextmanager
def eager_collector() -> Iterator[None]:
    """In every recording an old graph becomes garbage, and the collector would run at almost every allocation."""
    before, cycles = gc.get_threshold(), []

    def leave_garbage() -> None:
        if cycles:
            cycles.pop()
        gc.set_threshold(1, 1, 1)

    for _ in range(40 if torch.cuda.is_available() else 0):
        graph, x = torch.cuda.CUDAGraph(), torch.zeros(8, device="cuda")
        with torch.cuda.graph(graph):
            x += 1
        cycle: list[Any] = [graph]
        cycle.append(cycle)
        cycles.append(cycle)
    # Not outside of recordings: there it would take most of the time.
    with during_recordings(leave_garbage, lambda: gc.set_threshold(*before)):
        yield


async def rounds(pair: WorkerPair, want: dict[int, RunOutcome], num_rounds: int) -> dict[str, int]:
    wrong = cases = 0
    for _ in range(num_rounds):
        for length, expected in want.items():
            for run in (cold_and_one_more, hand_over):
                given = (pair, MemoryStore()) if run is hand_over else (pair,)
                got = await run(*given, tokens_of(length), 3)  # type: ignore[operator]
                cases += 1
                wrong += got is None or not compare(expected, got).identical
    return {"cases": cases, "wrong": wrong}


def tokens_of(length: int) -> Any:
    return np.random.default_rng(length).integers(0, 60, length).astype(np.uint32)


async def check(args: argparse.Namespace, save: Any) -> None:
    with tempfile.TemporaryDirectory() as where:
        directory = released.write("base", Path(where) / "model", seed=2)
        identity = identify(directory, revision="recordings")
        dtype = torch.float32 if args.device == "cpu" else torch.bfloat16
        model = load_model(directory, device=args.device, dtype=dtype)
    subject = Subject(name="base", identity=identity, model=model)

    def pair() -> WorkerPair:
        """Workers with a compute thread of their own, because a thread has its own current stream."""
        return WorkerPair(subject, ComputeThread("recordings"), 64)

    async def row(name: str, workers: WorkerPair) -> None:
        on = await workers.compute.run(current_stream)
        save({"after": name, "stream": on, **await rounds(workers, want, args.rounds)})

    first = pair()
    want = {length: await cold_and_one_more(first, tokens_of(length), 3) for length in LENGTHS}
    await row("recordings that work", first)
    with eager_collector():
        await row("garbage while recording", first)
    for name, keeps in (("a failed recording", True), ("a failed recording, as before", False)):
        workers = pair()
        plain = step_runner._recording
        if not keeps:
            step_runner._recording = lambda *_: contextlib.nullcontext()
        with during_recordings(torch.cuda.synchronize):  # it is not permitted there
            await run_cold(workers, tokens_of(20))
        step_runner._recording = plain
        await row(name, workers)
        workers.compute.close()
    first.compute.close()


def current_stream() -> str:
    if not torch.cuda.is_available():
        return ""
    return "default" if torch.cuda.current_stream() == torch.cuda.default_stream() else "another"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--out", type=Path, default=Path())
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {"rows": []}

    def save(row: dict[str, Any]) -> None:
        found["rows"].append(row)
        print(json.dumps(row), flush=True)
        run_record.write(args.out / "failed_recordings.json", found, "torch")

    torch.set_grad_enabled(False)
    asyncio.run(check(args, save))


if __name__ == "__main__":
    main()
