"""Which cases, in which order. For each model, format and strategy:

1. A conversation is prefilled and decoded under the strategy, so the store holds what that strategy leaves, blocks
   and checkpoints written by decode among it.
2. Its next turn is run cold once, and then hit at every block boundary by every plan that the strategy allows: the
   store shows a prefix that ends there, as it would after evicting the rest.
3. Prompts that leave the conversation at random tokens are run cold and hit, the second time under `auto`'s fork.
4. Once a model: handoffs at random positions, adopted by another worker that runs a token more.
5. Once a model: prompts cut at any row and run among others (cuts), through one small pool (worker_checks), as whole
   requests to a decode worker (served); other names and foreign handoffs; ties; reproducible mode; known answers.
6. On a card: a prompt there against the same prompt on the CPU. Over several ranks: a prompt there against one rank.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from antefix.clients import Tokens
from antefix.layout import KVFormat
from antefix.model import probe
from antefix.model.backend import uses_triton
from antefix.record import LookupResult
from antefix.store.api import Store
from antefix.window import PlanKind
from antefix_console.verify.card import against_cpu
from antefix_console.verify.compare import Difference, RunOutcome, compare
from antefix_console.verify.cuts import check_cuts, run_pieces
from antefix_console.verify.known_answers import check_answer
from antefix_console.verify.models import Subject
from antefix_console.verify.paired_runs import (
    RestoredRun,
    WorkerPair,
    cold_and_one_more,
    generate,
    hand_over,
    prompt_of,
    run,
    run_cold,
)
from antefix_console.verify.reproducible_mode import check_aligned
from antefix_console.verify.served import check_served
from antefix_console.verify.stores import PrefixView
from antefix_console.verify.ties import check_ties
from antefix_console.verify.verdict import Cases, Report
from antefix_console.verify.worker_checks import (
    any_tokens,
    check_fingerprints,
    check_foreign_handoff,
    check_names,
    check_reused_rows,
)
from antefix_prefill.worker.compute_thread import ComputeThread

log = logging.getLogger("antefix.verify")

# Relative errors that are accepted where a machine's arithmetic depends on shapes (`antefix doctor` says so). Float32
# differs in its last bits there; a rounding that tips over moves a value by up to an eighth in FP8 and, where
# 6 follows 4, by a third in FP4.
SHAPE_BOUND = {"float32": 1e-3, "float64": 1e-9, "fp8": 0.334}
# Bounded replays are approximate by design: two unrelated values of one size differ by at most 2, so more is garbage.
# How good one is, by k, is measured by benchmarks/bounded_replay.py (docs/results/window_state.md, "Bounded replay").
BOUNDED_BOUND = 2.0
# Card against CPU, median over tokens of a logit's largest difference. Float16 in attention and other orders of sums
# tip a few roundings over, and rarely pick another expert or entry, which moves that token's logits by any amount.
CPU_BOUND = {"float32": 1e-3, "float64": 1e-9, "fp8": 5e-2}
# Output of a conversation that need not be whole blocks.
SHORT_OUTPUT_TOKENS = 8
# Of each answer in whole requests: enough to pass a boundary of a small model's blocks.
SERVED_TOKENS = 6
# Blocks of so many tokens are long prompts already: there is less of everything.
LARGE_BLOCK = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """What is verified: a device, and the settings of these names."""

    device: str = "cpu"
    kernels: str = "auto"
    reproducible: bool = True

    def is_invariant(self, subject: Subject) -> bool:
        return self.reproducible and uses_triton(self.kernels, subject.model.layout, self.device)


CPU = Backend()


@dataclass(frozen=True, slots=True, kw_only=True)
class Coverage:
    """How much is verified of one model. Counts are of blocks, tokens or prompts.

    bounded_windows: which k of bounded replay.
    every_pair: every boundary by every plan under every strategy. Otherwise what repeats is left out: replays do not
        depend on the strategy, so they are run at every boundary under `zero` and at the last one elsewhere; a
        checkpoint is resumed from once; forks are run under `auto`, which alone looks at them; only there are whole
        blocks decoded, elsewhere the output just passes a boundary; cold is run under `auto` and `zero`.
    num_cuts, num_batches: ways to cut one prompt, and batches that it is run in.  num_served: whole requests at once.
    is_extreme: strategies show nothing new here; only checkpoints at every block, and none, are tried.
    num_output_blocks: 0 for just past a boundary.  stride: of the boundaries that are hit; the last one always is.
    """

    num_blocks: int
    num_output_blocks: int
    num_forks: int
    num_handoffs: int
    bounded_windows: Sequence[int]
    every_pair: bool
    num_cuts: int = 0
    num_batches: int = 0
    num_served: int = 0
    is_extreme: bool = False
    stride: int = 1
    prefill_chunk: int = 256
    seed: int = 0


PARTS: Final = (
    *("arithmetic", "conversations", "handoffs", "cuts", "rows", "served", "names", "ties", "answers"),
    *("reproducible", "ranks"),
)


class Suite:
    """Verifies one model against a store. `progress` is told what is being done."""

    def __init__(
        self,
        subject: Subject,
        store: Store,
        plan: Coverage,
        report: Report,
        progress: Callable[[str], None],
        backend: Backend = CPU,
    ) -> None:
        self._subject = subject
        self._store = store
        self._plan = plan
        self._progress = progress
        self._random = np.random.default_rng(plan.seed)
        self._cold: tuple[bytes, RunOutcome] | None = None
        self._workers = WorkerPair(
            subject, ComputeThread("verify"), plan.prefill_chunk, backend.kernels, backend.reproducible
        )
        self._cases = Cases(report=report, subject=subject.name, kv_format=subject.kv_format.value)
        # On a CPU every bit is demanded, whatever a probe found: there is no bound that hits may be off by.
        is_free = backend.device == "cpu" or backend.is_invariant(subject)
        self._exact_bound = 0.0 if is_free else SHAPE_BOUND[subject.kv_format.value]

    async def run(self, strategies: Sequence[str], parts: Sequence[str] = PARTS) -> None:
        """parts: of PARTS, which to run."""
        try:
            # It ends three tokens before a boundary, so that a few tokens of output pass it.
            document = self._tokens(self._plan.num_blocks * self._subject.block_size - 3)
            self._question = self._tokens(self._subject.block_size // 2 + 1)
            for part in parts:
                try:
                    await self._run_part(part, document, strategies)
                except Exception as err:
                    # What crashes is wrong as well, and the other parts may say more about it.
                    log.debug("%s failed", part, exc_info=True)
                    self._cases.add(part, "crashed", 0, problem=f"{part}: {type(err).__name__}: {err}")
        finally:
            self._workers.compute.close()

    async def _run_part(self, part: str, document: Tokens, strategies: Sequence[str]) -> None:
        self._tell(part)
        size, workers, cases, bound = self._subject.block_size, self._workers, self._cases, self._exact_bound
        match part:
            case "arithmetic":
                self._arithmetic()
            case "conversations":
                await self._conversations(document, strategies)
            case "handoffs":
                await self._handoffs(document)
                foreign = self._tokens(size + 1)
                await check_foreign_handoff(workers, self._store, document[: size + 1], foreign, cases)
            case "cuts":
                # Three blocks are enough to show what depends on a row's place, and at least two tiles of rows.
                tokens = self._tokens(min(max(3 * size + 3, 40), 2 * LARGE_BLOCK))
                ways = {"num_cuts": self._plan.num_cuts, "num_batches": self._plan.num_batches}
                check_cuts(workers, tokens, self._random, cases, **ways, bound=bound)
            case "rows" if self._plan.num_served:
                prompts = [self._tokens(blocks * size + rest) for blocks, rest in ((3, 1), (2, size - 1), (3, 2))]
                await check_reused_rows(workers, prompts, cases, bound=bound)
            case "served" if self._plan.num_served and not bound:
                prompts = [self._tokens(int(n)) for n in self._random.integers(1, 3 * size, self._plan.num_served)]
                await check_served(workers, prompts, cases, num_tokens=min(size + 3, SERVED_TOKENS))
            case "names":
                await check_names(workers, self._store, document, strategies, cases)
                check_fingerprints(workers, cases)
            case "ties":
                num_entries = self._subject.model.config.index_topk + 2
                check_ties(workers, self._tokens(num_entries * self._subject.identity.geometry.csa_ratio), cases)
            case "answers" if self._subject.model.device.type == "cpu":
                check_answer(self._subject, self._cases.report)
            case "answers":
                self._against_cpu(document)
            case "ranks" if self._subject.alone is not None:
                self._ranks(self._subject.alone())
            case "reproducible" if self._can_simulate_shapes:
                history = self._tokens(3 * size + 1)
                await check_aligned(workers, history, np.concatenate((history, self._tokens(4 * size))), cases)

    def _ranks(self, alone: Subject) -> None:
        """The same prompt over ranks and on one: to the bit on a CPU, where names are the same."""
        tokens = self._tokens(2 * self._subject.block_size + 3)
        cuts = (1, self._subject.block_size + 1, len(tokens) - 1)
        one = replace(self._workers, subject=alone)
        found = compare(run_pieces(one, tokens, cuts), run_pieces(self._workers, tokens, cuts))
        on_cpu = self._subject.model.device.type == "cpu"
        problem = f"ranks and one: {found.where}" if on_cpu and not found.identical else ""
        bound = 0.0 if on_cpu else SHAPE_BOUND[self._subject.kv_format.value]
        self._cases.add("ranks", "one rank", len(tokens), found, bound=bound, problem=problem)

    @property
    def _can_simulate_shapes(self) -> bool:
        """Rounding to FP8 would swallow what the simulated machine adds; other ranks are not told of it."""
        if self._subject.model.lead is not None:
            return False
        if self._subject.model.device.type != "cpu" or self._subject.kv_format is not KVFormat.FLOAT32:
            return False
        return self._subject.block_size < LARGE_BLOCK and (self._plan.every_pair or not self._plan.is_extreme)

    def _tell(self, what: str) -> None:
        self._progress(f"{self._subject.name}/{self._subject.kv_format.value}, {what}")

    async def _conversations(self, document: Tokens, strategies: Sequence[str]) -> None:
        for strategy in strategies:
            self._tell(strategy)
            await self._conversation(strategy, document, bounded_windows=0)
        for windows in self._plan.bounded_windows:
            self._tell(f"bounded replay of {windows}")
            await self._conversation("zero", document, bounded_windows=windows)

    async def _conversation(self, strategy: str, document: Tokens, *, bounded_windows: int) -> None:
        # 1. One turn, stored as the strategy says.
        num_output = self._plan.num_output_blocks * self._subject.block_size
        if not num_output or (not self._plan.every_pair and (strategy != "auto" or bounded_windows)):
            num_output = SHORT_OUTPUT_TOKENS
        engine = self._workers.new(
            self._store, len(document) + num_output, strategy=strategy, bounded_windows=bounded_windows
        )
        await self._store.register(engine.fingerprint, engine.layout)
        history = await generate(engine, document, num_output)
        # 2. The next turn, cold and hit at every boundary by every plan.
        turn = np.concatenate((history, self._question))
        cold = await self._run_cold(turn)
        found = await self._store.lookup(prompt_of(engine, turn).chain.hashes, fingerprint=engine.fingerprint)
        last = len(history) // self._subject.block_size
        # An approximate replay proves nothing at one boundary that it does not at the next: the short form takes half.
        stride = self._plan.stride * (2 if bounded_windows and not self._plan.every_pair else 1)
        for num_blocks in (*range(1, last, stride), last):
            is_last = num_blocks == last
            kinds = [PlanKind.BOUNDED] if bounded_windows else self._kinds(strategy, num_blocks, found, is_last)
            for kind in kinds:
                await self._hit(strategy, kind, turn, cold, num_blocks, bounded_windows)
        # 3. Forks at random tokens.
        if not bounded_windows and (self._plan.every_pair or strategy == "auto"):
            for _ in range(self._plan.num_forks):
                await self._fork(strategy, history)

    async def _run_cold(self, turn: Tokens) -> RunOutcome:
        """Without a store; strategies change nothing in it, so the last one is kept."""
        if self._cold is None or self._cold[0] != turn.tobytes():
            self._cold = turn.tobytes(), await run_cold(self._workers, turn)
        return self._cold[1]

    def _kinds(self, strategy: str, num_blocks: int, found: LookupResult, is_last: bool) -> list[PlanKind]:
        if is_last:
            # Cold is the same whatever is stored: once, with everything there.
            cold = [PlanKind.COLD] * (self._plan.every_pair or strategy in ("auto", "zero"))
            return [PlanKind.CHECKPOINT, PlanKind.REPLAY, *cold]
        if self._plan.every_pair:
            return [PlanKind.CHECKPOINT, PlanKind.REPLAY]
        if strategy == "zero":
            return [PlanKind.REPLAY]
        is_sampled = strategy != "full" or num_blocks % 3 == 1
        return [PlanKind.CHECKPOINT] if num_blocks in found.checkpoints and is_sampled else []

    async def _hit(
        self, strategy: str, kind: PlanKind, turn: Tokens, cold: RunOutcome, num_blocks: int, bounded_windows: int
    ) -> None:
        view = PrefixView(self._store, num_blocks)
        engine = self._workers.new(view, len(turn), strategy=strategy, kind=kind, bounded_windows=bounded_windows)
        restored = await run(engine, turn)
        if kind is PlanKind.CHECKPOINT and restored.plan == "cold":
            return  # no checkpoint up to here under this strategy
        hit = num_blocks * self._subject.block_size
        problem = _problem(kind, restored, view, stored_tokens=hit, errors=engine.counters.last_error)
        bound = BOUNDED_BOUND if bounded_windows else self._exact_bound
        label = f"bounded({bounded_windows})" if bounded_windows else strategy
        self._add(label, restored, len(turn), compare(cold, restored.outcome), bound=bound, problem=problem)

    async def _fork(self, strategy: str, history: Tokens) -> None:
        leaves_at = int(self._random.integers(self._subject.block_size, len(history)))
        shared = leaves_at // self._subject.block_size
        for _ in range(2):  # auto leaves a checkpoint when the first one forks; the second resumes there
            turn = np.concatenate((history[:leaves_at], self._tokens(self._subject.block_size + 5)))
            cold = await run_cold(self._workers, turn)
            for kind in (PlanKind.REPLAY, PlanKind.CHECKPOINT):
                view = PrefixView(self._store, shared)
                engine = self._workers.new(view, len(turn), strategy=strategy, kind=kind)
                restored = await run(engine, turn)
                if kind is PlanKind.CHECKPOINT and restored.plan == "cold":
                    continue
                stored = shared * self._subject.block_size
                problem = _problem(kind, restored, view, stored_tokens=stored, errors=engine.counters.last_error)
                difference = compare(cold, restored.outcome)
                self._add(strategy, restored, len(turn), difference, bound=self._exact_bound, problem=problem)
            # Now for good, through the same store: the checkpoint of the fork is left here.
            await run(self._workers.new(self._store, len(turn), strategy=strategy, kind=PlanKind.REPLAY), turn)

    async def _handoffs(self, document: Tokens) -> None:
        async for position in self._positions(len(document)):
            tokens, next_token = document[:position], int(document[position])
            cold = await cold_and_one_more(self._workers, tokens, next_token)
            taken = await hand_over(self._workers, self._store, tokens, next_token)
            restored = RestoredRun(outcome=taken or cold, plan="handoff", hit_tokens=position)
            problem = "" if taken is not None else "the handoff could not be taken"
            difference = compare(cold, restored.outcome)
            self._add("handoff", restored, position, difference, bound=self._exact_bound, problem=problem)

    def _arithmetic(self) -> None:
        """What a worker asks at its start: do the products of this model mind a row's place?"""
        if self._subject.model.device.type != "cpu":
            return
        measured = probe(self._subject.model)
        for text in measured.failed:
            self._cases.add("arithmetic", "probe", 0, problem=f"arithmetic: {text}")
        self._cases.add("arithmetic", "probe", 0, problem="" if measured.num_proved else "the probe checked nothing")

    def _against_cpu(self, document: Tokens) -> None:
        self._tell("card against CPU")
        bound = CPU_BOUND[self._subject.kv_format.value]
        self._cases.add("card against CPU", "cold", len(document), against_cpu(self._workers, document), bound=bound)

    async def _positions(self, num_tokens: int) -> AsyncIterator[int]:
        """A block boundary, its neighbours, and random positions."""
        size = self._subject.block_size
        near = [position for position in (1, size - 1, size, size + 1, 2 * size) if position < num_tokens]
        random = self._random.integers(1, num_tokens, max(self._plan.num_handoffs - len(near), 0))
        for position in (near + [int(n) for n in random])[: self._plan.num_handoffs]:
            yield position

    def _tokens(self, num_tokens: int) -> Tokens:
        return any_tokens(self._random, self._subject.identity.vocab_size, num_tokens)

    def _add(
        self,
        strategy: str,
        restored: RestoredRun,
        num_tokens: int,
        difference: Difference,
        *,
        bound: float,
        problem: str,
    ) -> None:
        label = "periodic(p)" if strategy.startswith("periodic") else strategy
        self._cases.add(
            label, restored.plan, num_tokens, difference, hit_tokens=restored.hit_tokens, bound=bound, problem=problem
        )


def _problem(kind: PlanKind, restored: RestoredRun, view: PrefixView, *, stored_tokens: int, errors: str) -> str:
    """What went wrong besides the comparison: another plan than asked for, or global KV written that existed."""
    if not restored.plan.startswith(kind.value):
        return f"asked for {kind.value}, got {restored.plan} {errors}"
    if kind in (PlanKind.REPLAY, PlanKind.BOUNDED) and restored.hit_tokens != stored_tokens:
        return f"{stored_tokens} tokens are stored, {restored.hit_tokens} were hit"
    if any(position <= stored_tokens for position in view.put_positions):
        return "global KV that is stored was written again"
    return ""
