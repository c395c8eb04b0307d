"""Drafting with the released MTP layer on a GPU: does it change a token or a hit, and what does it cost per step?

    python -m benchmarks.drafting_on_card --parts check times --out results

check     a small checkpoint in the released formats, loaded with and without its draft layer. Greedy and sampled
          answers of eight prompts, decoded in one batch by a worker's scheduler, must be the same tokens without
          drafting, with the layer's own drafts, and with drafts that are right three times in five. Drafting must store
          the same blocks, and a longer prompt must be restored from them with the same hit and the logits of a cold
          run, by workers with and without the draft layer. In reproducible mode everything must be equal. Without it,
          a step of two tokens may use other kernels than a step of one, and the row says how many tokens are equal.
times     `--layers` layers of V4-Flash's width and the draft layer, drawn on the GPU: milliseconds per step of 1 and 32
          sequences behind `--context` tokens, without drafting, with the layer's own drafts (random weights: nearly all
          are wrong), and with right drafts. A step includes choosing the tokens. `pays_from` is the share of right
          drafts from which drafting gives more tokens per second.

Writes drafting_on_card.json after every row. `--toy --device cpu` runs everything at small widths.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import json
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from antefix.model import Model, Sequence, WindowState, load_model
from antefix.model_dir import ModelIdentity, identify
from antefix.record import RecordKind
from antefix.sampling import Sampling
from antefix.store.api import Store
from antefix.window import PlanKind
from antefix_console.verify.models import Subject
from antefix_console.verify.paired_runs import WorkerPair, prompt_of, run
from antefix_console.verify.stores import EmptyStore, MemoryStore
from antefix_decode import step as steps
from antefix_decode.scheduler import Running, Scheduler
from antefix_decode.stopping import Stopper
from antefix_decode.token_choice import Sampler
from antefix_prefill.record_writer import RecordWriter
from antefix_prefill.run_prompt import run_prompt
from antefix_prefill.worker.compute_thread import ComputeThread
from antefix_prefill.worker.engine import Engine
from benchmarks import run_record
from benchmarks.drawn_flash import draw_share
from tests.model import released_checkpoint as released

# Lengths around the ends of blocks, groups and windows.
PROMPTS = (130, 17, 240, 63, 127, 128, 5, 301)
PATTERN = (True, True, False, True, False)
SAMPLINGS = {
    "greedy": Sampling(max_tokens=64, ignore_eos=True),
    "sampled": Sampling(max_tokens=48, ignore_eos=True, temperature=1.1, top_p=0.95, seed=11),
}
Answers = list[list[int]]
Save = Callable[[str, dict[str, Any]], None]


@dataclass(slots=True)
class Guesses:
    """Replaces a model's drafts by tokens of known answers, where the pattern says so. The draft layer runs as always.

    answers: for each window state, the position of its prompt's end, and the whole answer.
    """

    pattern: tuple[bool, ...]
    answers: dict[int, tuple[int, list[int]]] = field(default_factory=dict)

    def know(self, running: Running, answer: list[int]) -> None:
        self.answers[id(running.sequence.window)] = (running.prompt_tokens, answer)

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        plain = steps.draft

        def draft(model: Model, windows: Any, next_tokens: list[int], ops: Any) -> list[int]:
            found = plain(model, windows, next_tokens, ops)
            for place, window in enumerate(windows):
                end, answer = self.answers[id(window)]
                number = window.position + 1 - end
                if number < len(answer):
                    right = answer[number]
                    other = (right + 1) % model.config.vocab_size
                    found[place] = right if self.pattern[number % len(self.pattern)] else other
            return found

        steps.draft = draft
        try:
            yield
        finally:
            steps.draft = plain


async def finish(scheduler: Scheduler, runnings: list[Running]) -> Answers:
    """Decode all sequences in one batch until they end. Returns each one's tokens, without its first."""

    async def read(running: Running) -> list[int]:
        return [token async for piece in scheduler.tokens(running) for token in piece.tokens]

    # All of them join before the loop first runs.
    for running in runnings:
        scheduler.join(running)
    return await asyncio.gather(*(read(running) for running in runnings))


def running_of(engine: Engine, prompt: Any, sequence: Sequence, first: int, sampling: Sampling) -> Running:
    sampler, stopper = Sampler(sampling), Stopper(sampling, frozenset())
    sampler.take(first)
    stopper.push(first)
    return Running(
        prompt=prompt, sequence=sequence, sampler=sampler, stopper=stopper, next_token=first,
        writer=RecordWriter(engine.store, engine.counters), prompt_tokens=sequence.position,
    )  # fmt: skip


@dataclass(slots=True)
class Check:
    """One model with and without its draft layer, and workers of either kind."""

    directory: Path
    reproducible: bool
    device: str
    dtype: torch.dtype
    compute: ComputeThread
    pairs: dict[bool, WorkerPair] = field(init=False)

    def __post_init__(self) -> None:
        identity = identify(self.directory, revision="drafting")
        self.pairs = {}
        for drafts in (False, True):
            model = load_model(self.directory, device=self.device, dtype=self.dtype, drafts=drafts)
            subject = Subject(name="released", identity=identity, model=model)
            self.pairs[drafts] = WorkerPair(subject, self.compute, 64, reproducible=self.reproducible)

    def worker(self, store: Store, *, drafts: bool, kind: PlanKind = PlanKind.COLD) -> Engine:
        return self.pairs[drafts].new(store, 4096, kind=kind)

    async def answers(
        self, store: Store, sampling: Sampling, *, drafts: bool, known: Answers | None = None
    ) -> tuple[Answers, Scheduler]:
        """Answers of all prompts in one batch. known: drafts are right according to the pattern, for these answers."""
        engine = self.worker(store, drafts=drafts)
        scheduler, guesses = Scheduler(engine, len(PROMPTS)), Guesses(PATTERN)
        runnings, firsts = [], []
        for number, tokens in enumerate(prompts()):
            computed = await run_prompt(engine, prompt_of(engine, tokens))
            first = Sampler(sampling).choose(computed.logits, len(tokens))
            firsts.append(first)
            runnings.append(running_of(engine, computed.prompt, computed.sequence, first, sampling))
            if known is not None:
                guesses.know(runnings[-1], known[number])
        with guesses.in_use() if known is not None else contextlib.nullcontext():
            found = await finish(scheduler, runnings)
        for running in runnings:
            await scheduler.store_end(running)
            await scheduler.leave(running)
        await scheduler.close()
        return [[first, *rest] for first, rest in zip(firsts, found, strict=True)], scheduler

    async def hit(self, store: Store, tokens: Any, *, drafts: bool) -> tuple[int, bool, float]:
        """A prompt restored from the store against its cold run without one: the hit's tokens, whether logits and state
        are equal, and how far the logits are from each other.
        """
        cold = await run(self.worker(EmptyStore(), drafts=drafts), tokens)
        got = await run(self.worker(store, drafts=drafts, kind=PlanKind.CHECKPOINT), tokens)
        one, other = got.outcome.logits, cold.outcome.logits
        error = float(np.abs(one - other).max() / np.abs(other).max())
        return got.hit_tokens, bool(np.array_equal(one, other)), error


def prompts() -> list[Any]:
    random = np.random.default_rng(7)
    return [random.integers(0, 64, length).astype(np.uint32) for length in PROMPTS]


async def check(args: argparse.Namespace, save: Save) -> None:
    dtype = torch.float32 if args.device == "cpu" else torch.bfloat16
    compute = ComputeThread("drafting")
    with tempfile.TemporaryDirectory() as where:
        directory = released.write("flash", Path(where) / "model", seed=4)
        for reproducible in (True, False) if args.device != "cpu" else (True,):
            one = Check(directory, reproducible, args.device, dtype, compute)
            for name, sampling in SAMPLINGS.items():
                try:
                    save("check", {"reproducible": reproducible, "sampling": name, **await compare(one, sampling)})
                except Exception:  # noqa: BLE001 - the next one says more
                    print(f"{name}, reproducible {reproducible}: FAILED\n{traceback.format_exc()}", flush=True)
    compute.close()


async def compare(one: Check, sampling: Sampling) -> dict[str, Any]:
    """Answers, stored blocks and hits, without drafting and with the layer's own and with mostly right drafts."""
    stores = {name: MemoryStore() for name in ("plain", "own", "right")}
    plain, _ = await one.answers(stores["plain"], sampling, drafts=False)
    row: dict[str, Any] = {"answers": len(plain), "tokens": sum(map(len, plain))}
    for name, known in (("own", None), ("right", plain)):
        got, scheduler = await one.answers(stores[name], sampling, drafts=True, known=known)
        same = [sum(a == b for a, b in zip(x, y, strict=True)) for x, y in zip(plain, got, strict=True)]
        row |= {f"{name}_equal_answers": sum(x == y for x, y in zip(plain, got, strict=True)),
                f"{name}_equal_tokens": sum(same), f"{name}_drafted": scheduler.num_drafted,
                f"{name}_kept": scheduler.num_drafts_kept,
                f"{name}_equal_blocks": blocks_of(stores[name]) == blocks_of(stores["plain"])}  # fmt: skip
    row["blocks"] = len(blocks_of(stores["plain"]))
    number = PROMPTS.index(240)
    longer = np.concatenate((prompts()[number], np.array(plain[number], np.uint32), prompts()[3]))
    for name, drafts in (("plain", False), ("plain", True), ("right", False), ("right", True)):
        hit_tokens, is_equal, error = await one.hit(stores[name], longer, drafts=drafts)
        key = f"stored_{name}_read_{'drafting' if drafts else 'plain'}"
        row[key] = {"hit_tokens": hit_tokens, "equals_cold": is_equal, "error": error}
    return row


def blocks_of(store: MemoryStore) -> dict[bytes, bytes]:
    return {key[2]: payload for key, payload in store.payloads.items() if key[0] is RecordKind.BLOCK}


def times(args: argparse.Namespace, save: Save) -> None:
    dtype = torch.float32 if args.device == "cpu" else torch.bfloat16
    model = draw_share(ranks=None, device=args.device, num_layers=args.layers, toy=args.toy, dtype=dtype, drafts=True)
    for count in args.sequences:
        try:
            asyncio.run(measure(model, count, args, save))
        except Exception:  # noqa: BLE001 - the next one says more
            print(f"{count} sequences: FAILED\n{traceback.format_exc()}", flush=True)
        gc.collect()


async def measure(model: Model, count: int, args: argparse.Namespace, save: Save) -> None:
    """The ways one after another, each twice: the first run compiles kernels and records graphs."""
    bench = Bench(model, count, args)
    ways: tuple[tuple[str, bool, tuple[bool, ...]], ...] = (
        ("plain", False, ()), ("own drafts", True, ()), ("right drafts", True, (True,)),
    )  # fmt: skip
    answers: Answers = []
    found: dict[str, dict[str, Any]] = {}
    for way, drafts, pattern in ways:
        for _ in range(2):
            got, row = await bench.run(drafts=drafts, guesses=Guesses(pattern) if pattern else None, known=answers)
        if way == "plain":
            answers = got
        found[way] = {"sequences": count, "way": way, **row}
        if drafts:
            found[way]["pays_from"] = row["ms_per_step"] / found["plain"]["ms_per_step"] - 1
        save("times", found[way])
    bench.close()


class Bench:
    """A worker whose sequences all continue one prefix, whose KV is what the pool's memory holds."""

    def __init__(self, model: Model, count: int, args: argparse.Namespace) -> None:
        self.model, self.count, self.args = model, count, args
        self.draft_layer, self.compute = model.mtp, ComputeThread("drafting")
        identity = ModelIdentity(
            path=Path("random"), geometry=model.config.geometry, weights_revision=f"drawn-{args.layers}",
            tokenizer_revision="", vocab_size=model.config.vocab_size, max_tokens=model.config.max_position_embeddings,
        )  # fmt: skip
        pair = WorkerPair(Subject(name="flash", identity=identity, model=model), self.compute, 8192, reproducible=False)
        size = model.config.geometry.block_size
        own = -(-2 * args.tokens // size) + 1
        self.engine = pair.new(EmptyStore(), args.context + count * own * size)
        self.prefix = self.engine.blocks.allocate(args.context // size)
        self.own = [self.engine.blocks.allocate(own) for _ in range(count)]

    async def run(self, *, drafts: bool, guesses: Guesses | None, known: Answers) -> tuple[Answers, dict[str, Any]]:
        engine, args = self.engine, self.args
        # A worker that was told to draft has the layer, any other has not.
        self.model.mtp = self.draft_layer if drafts else nn.ModuleList()
        sampling = Sampling(max_tokens=args.tokens, ignore_eos=True)
        scheduler, runnings = Scheduler(engine, self.count), []
        random = np.random.default_rng(5)
        for number, blocks in enumerate(self.own):
            window = WindowState.zeros(engine.layout, args.context, engine.device)
            sequence = Sequence([*self.prefix, *blocks], window)
            prompt = prompt_of(engine, random.integers(0, 64, args.context).astype(np.uint32))
            runnings.append(running_of(engine, prompt, sequence, number % 64, sampling))
            if guesses is not None:
                guesses.know(runnings[-1], known[number])
        spans = self._time_steps(scheduler)
        with guesses.in_use() if guesses is not None else contextlib.nullcontext():
            rest = await finish(scheduler, runnings)
        await scheduler.close()
        # The first steps have no draft to run, and the last ones not all sequences.
        full = [ms for ms, ready in spans if ready == self.count][2:]
        row = {"steps": len(full), "ms_per_step": statistics.median(full), "drafted": scheduler.num_drafted,
               "kept": scheduler.num_drafts_kept}  # fmt: skip
        share = scheduler.num_drafts_kept / max(scheduler.num_drafted, 1)
        row |= {"tokens_per_step": self.count * (1 + share)}
        row["tokens_per_s"] = row["tokens_per_step"] / row["ms_per_step"] * 1e3
        return [[number % 64, *each] for number, each in enumerate(rest)], row

    def _time_steps(self, scheduler: Scheduler) -> list[tuple[float, int]]:
        spans: list[tuple[float, int]] = []
        plain = scheduler._step

        async def step(batch: list[Running]) -> None:
            started = time.perf_counter()
            await plain(batch)
            spans.append(((time.perf_counter() - started) * 1e3, len(batch)))

        scheduler._step = step  # type: ignore[method-assign]
        return spans

    def close(self) -> None:
        self.model.mtp = self.draft_layer
        self.compute.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=["check", "times"], choices=("check", "times"))
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--context", type=int, default=8192, help="number of earlier tokens of each sequence")
    parser.add_argument("--tokens", type=int, default=24, help="tokens that each sequence generates")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--toy", action="store_true", help="use small tensor widths, to see whether the benchmark runs")
    parser.add_argument("--out", type=Path, default=Path())
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {"layers": args.layers, "context": args.context, "check": [], "times": []}

    def save(part: str, row: dict[str, Any]) -> None:
        found[part].append(row)
        print(json.dumps(row), flush=True)
        run_record.write(args.out / "drafting_on_card.json", found, "torch")

    # Not inference mode: a worker's window states are made outside of it too.
    torch.set_grad_enabled(False)
    if "check" in args.parts:
        asyncio.run(check(args, save))
    if "times" in args.parts:
        times(args, save)


if __name__ == "__main__":
    main()
