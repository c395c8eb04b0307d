"""The cases and their order. For each model, format and strategy:

1. A conversation is prefilled and decoded under the strategy. Then the store holds what the strategy leaves, including
   blocks and checkpoints written by decode.
2. The conversation's next turn is run cold once. After that it is run as a hit at every block boundary, by every plan
that the strategy allows: the store shows only a prefix that ends at the boundary, as if the rest had been evicted. 3.
Prompts that differ from the conversation from a random token on are run cold and as hits; under `auto`, the second
   such prompt resumes from the fork's checkpoint.
4. Once per model: handoffs at random positions, adopted by another worker that runs one more token.
5. Once per model: prompts cut at any row and run among others (cuts), through one small pool (worker_checks), as whole
   requests to a decode worker (served); other names and foreign handoffs; ties; reproducible mode; known answers.
6. On a GPU: the results of a prompt on the GPU and on the CPU are compared. Over several ranks: the results of a
prompt over the ranks and on one rank are compared.
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

# Relative errors allowed where a machine's arithmetic depends on shapes (`antefix doctor` reports that). Float32 then
# differs in its last bits. A value that is rounded the other way changes by up to an eighth in FP8, and in FP4, where 6
# follows 4, by up to a third.
SHAPE_BOUND = {"float32": 1e-3, "float64": 1e-9, "fp8": 0.334}
# Bounded replays are approximate by design. Two unrelated values of one size differ by at most 2, so more is garbage.
# How good they are, by k, is measured by benchmarks/bounded_replay.py (docs/results/window_state.md, "Bounded replay").
BOUNDED_BOUND = 2.0
# GPU against CPU: the largest logit difference of each token, median over tokens. Float16 in attention and other
# orders of sums round a few values the other way. Rarely this selects another expert or entry; then that token's logits
# differ by any amount. Models whose products round their inputs have a bound of their own (`card.against_cpu`).
CPU_BOUND = {"float32": 1e-3, "float64": 1e-9, "fp8": 5e-2}
# Output of a conversation where whole blocks of output are not needed.
SHORT_OUTPUT_TOKENS = 8
# Tokens of each answer in whole requests: enough to pass a block boundary of a small model.
SERVED_TOKENS = 6
# With blocks of at least so many tokens, prompts are long already, so fewer cases are run.
LARGE_BLOCK = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """The subject of verification: a device, and worker settings such as `kernels`."""

    device: str = "cpu"
    kernels: str = "auto"
    reproducible: bool = True

    def is_invariant(self, subject: Subject) -> bool:
        return self.reproducible and uses_triton(self.kernels, subject.model.layout, self.device)


CPU = Backend()


@dataclass(frozen=True, slots=True, kw_only=True)
class Coverage:
    """How much is verified of one model. Counts are numbers of blocks, tokens or prompts.

    bounded_windows: the values of k for bounded replay.
    every_pair: try every boundary by every plan under every strategy. Otherwise repetitions are left out: replays do
    not
        depend on the strategy, so they are run at every boundary under `zero` and at the last one under other
        strategies; one hit resumes from a checkpoint; forks and whole decoded blocks are run under `auto` only, and
        elsewhere the output just passes a boundary; cold is run under `auto` and `zero`.
    num_cuts, num_batches: ways to cut one prompt, and batches that it is run in.  num_served: whole requests at once.
    is_extreme: strategies show nothing new for this model; only checkpoints at every block, and none, are tried.
    num_output_blocks: blocks of output; 0: output just passes a boundary.  stride: hit every so many boundaries, and
    the
        last one.
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
    """Verifies one model against a store. `progress` is called with a text that says what is being done."""

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
        # On a CPU every bit must be equal, whatever a probe found: no error is accepted there.
        is_free = backend.device == "cpu" or backend.is_invariant(subject)
        self._exact_bound = 0.0 if is_free else SHAPE_BOUND[subject.kv_format.value]

    async def run(self, strategies: Sequence[str], parts: Sequence[str] = PARTS) -> None:
        """parts: which of PARTS to run."""
        try:
            # The document ends three tokens before a boundary, so that a few output tokens pass it.
            document = self._tokens(self._plan.num_blocks * self._subject.block_size - 3)
            self._question = self._tokens(self._subject.block_size // 2 + 1)
            for part in parts:
                try:
                    await self._run_part(part, document, strategies)
                except Exception as err:
                    # A crash counts as a failure; other parts may tell more about it.
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
                # Three blocks show what depends on a row's place; at least two tiles of rows are needed.
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
        """Run the same prompt over ranks and on one rank. On a CPU, where the names are the same, bits must be
        equal.
        """
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
        """This check is not made with FP8, whose rounding would hide what the simulated machine adds, and not over
        ranks, which cannot simulate.
        """
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
        # 1. One turn, stored under the strategy.
        num_output = self._plan.num_output_blocks * self._subject.block_size
        if not num_output or (not self._plan.every_pair and (strategy != "auto" or bounded_windows)):
            num_output = SHORT_OUTPUT_TOKENS
        engine = self._workers.new(
            self._store, len(document) + num_output, strategy=strategy, bounded_windows=bounded_windows
        )
        await self._store.register(engine.fingerprint, engine.layout)
        history = await generate(engine, document, num_output)
        # 2. The next turn, cold and as a hit at every boundary by every plan.
        turn = np.concatenate((history, self._question))
        cold = await self._run_cold(turn)
        found = await self._store.lookup(prompt_of(engine, turn).chain.hashes, fingerprint=engine.fingerprint)
        last = len(history) // self._subject.block_size
        # An approximate replay shows nothing at one boundary that it does not show at the next, so the short form tries
        # half.
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
        """Run without a store. Strategies do not affect this result, so the last result is kept."""
        if self._cold is None or self._cold[0] != turn.tobytes():
            self._cold = turn.tobytes(), await run_cold(self._workers, turn)
        return self._cold[1]

    def _kinds(self, strategy: str, num_blocks: int, found: LookupResult, is_last: bool) -> list[PlanKind]:
        if is_last:
            # A cold run is the same whatever is stored, so run it once, with everything stored.
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
        for _ in range(2):  # the first fork makes `auto` leave a checkpoint; the second resumes there
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
            # Run again through the store itself, so that the fork's checkpoint is written.
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
        """As a worker does at its start: measure whether this model's products depend on a row's place in the batch."""
        if self._subject.model.device.type != "cpu":
            return
        measured = probe(self._subject.model)
        for text in measured.failed:
            self._cases.add("arithmetic", "probe", 0, problem=f"arithmetic: {text}")
        self._cases.add("arithmetic", "probe", 0, problem="" if measured.num_proved else "the probe checked nothing")

    def _against_cpu(self, document: Tokens) -> None:
        self._tell("card against CPU")
        for each in against_cpu(self._workers, document, CPU_BOUND[self._subject.kv_format.value]):
            self._cases.add(
                "card against CPU", each.what, len(document), each.difference, bound=each.bound, problem=each.problem
            )

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
    """Failures other than unequal bits: another plan than requested, or existing global KV written again."""
    if not restored.plan.startswith(kind.value):
        return f"asked for {kind.value}, got {restored.plan} {errors}"
    if kind in (PlanKind.REPLAY, PlanKind.BOUNDED) and restored.hit_tokens != stored_tokens:
        return f"{stored_tokens} tokens are stored, {restored.hit_tokens} were hit"
    if any(position <= stored_tokens for position in view.put_positions):
        return "global KV that is stored was written again"
    return ""
