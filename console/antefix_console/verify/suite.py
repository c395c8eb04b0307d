"""Which cases, in which order. For each model, format and strategy:

1. A conversation is prefilled and decoded under the strategy, so the store holds what that strategy leaves, blocks
   and checkpoints written by decode among it.
2. Its next turn is run cold once, and then hit at every block boundary by every plan that the strategy allows: the
   store shows a prefix that ends there, as it would after evicting the rest.
3. Prompts that leave the conversation at random tokens are run cold and hit, the second time under `auto`'s fork.
4. Once a model: handoffs at random positions, adopted by another worker that runs a token more.
5. On a card: a prompt there against the same prompt on the CPU.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass

import numpy as np

from antefix.clients import Tokens
from antefix.model import probe
from antefix.model.backend import uses_triton
from antefix.record import LookupResult
from antefix.store.api import Store
from antefix.window import PlanKind
from antefix_console.verify.card import against_cpu
from antefix_console.verify.compare import Difference, RunOutcome, compare
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
from antefix_console.verify.stores import PrefixView
from antefix_console.verify.verdict import Case, Report
from antefix_prefill.worker.compute_thread import ComputeThread
from antefix_prefill.worker.engine import ignores_shapes

# Relative errors that are accepted where a machine's arithmetic depends on shapes (`antefix doctor` says so). Float32
# differs in its last bits there; a rounding that tips over moves a value by up to an eighth in FP8 and, where
# 6 follows 4, by a third in FP4.
SHAPE_BOUND = {"float32": 1e-3, "float64": 1e-9, "fp8": 0.334}
# Bounded replays are approximate by design: two unrelated values of one size differ by at most 2, so more is garbage.
# How good one is, by k, is measured by benchmarks/bounded_replay.py (docs/WINDOW_STATE.md, "Bounded replay").
BOUNDED_BOUND = 2.0
# Card against CPU, median over tokens of a logit's largest difference. Float16 in attention and other orders of sums
# tip a few roundings over, and rarely pick another expert or entry, which moves that token's logits by any amount.
CPU_BOUND = {"float32": 1e-3, "float64": 1e-9, "fp8": 5e-2}
# Output of a conversation that need not be whole blocks.
SHORT_OUTPUT_TOKENS = 8


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
    num_output_blocks: 0 for just past a boundary.  stride: of the boundaries that are hit; the last one always is.
    """

    num_blocks: int
    num_output_blocks: int
    num_forks: int
    num_handoffs: int
    bounded_windows: Sequence[int]
    every_pair: bool
    stride: int = 1
    prefill_chunk: int = 256
    seed: int = 0


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
        self._report = report
        self._progress = progress
        self._random = np.random.default_rng(plan.seed)
        self._cold: tuple[bytes, RunOutcome] | None = None
        self._workers = WorkerPair(
            subject, ComputeThread("verify"), plan.prefill_chunk, backend.kernels, backend.reproducible
        )
        is_free = ignores_shapes(
            probe(subject.model), backend.device, reproducible_kernels=backend.is_invariant(subject)
        )
        self._exact_bound = 0.0 if is_free else SHAPE_BOUND[subject.kv_format.value]

    async def run(self, strategies: Sequence[str]) -> None:
        try:
            # It ends three tokens before a boundary, so that a few tokens of output pass it.
            document = self._tokens(self._plan.num_blocks * self._subject.block_size - 3)
            self._question = self._tokens(self._subject.block_size // 2 + 1)
            for strategy in strategies:
                self._progress(f"{self._subject.name}/{self._subject.kv_format.value}, {strategy}")
                await self._conversation(strategy, document, bounded_windows=0)
            for windows in self._plan.bounded_windows:
                self._progress(f"{self._subject.name}/{self._subject.kv_format.value}, bounded replay of {windows}")
                await self._conversation("zero", document, bounded_windows=windows)
            await self._handoffs(document)
            if self._subject.model.device.type != "cpu":
                self._against_cpu(document)
        finally:
            self._workers.compute.close()

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
        self._progress(f"{self._subject.name}/{self._subject.kv_format.value}, handoffs")
        async for position in self._positions(len(document)):
            tokens, next_token = document[:position], int(document[position])
            cold = await cold_and_one_more(self._workers, tokens, next_token)
            taken = await hand_over(self._workers, self._store, tokens, next_token)
            restored = RestoredRun(outcome=taken or cold, plan="handoff", hit_tokens=position)
            problem = "" if taken is not None else "the handoff could not be taken"
            difference = compare(cold, restored.outcome)
            self._add("handoff", restored, position, difference, bound=self._exact_bound, problem=problem)

    def _against_cpu(self, document: Tokens) -> None:
        self._progress(f"{self._subject.name}/{self._subject.kv_format.value}, card against CPU")
        bound = CPU_BOUND[self._subject.kv_format.value]
        self._report.add(
            Case(
                strategy="card against CPU",
                plan="cold",
                subject=self._subject.name,
                kv_format=self._subject.kv_format.value,
                hit_tokens=0,
                prompt_tokens=len(document),
                bound=bound,
                difference=against_cpu(self._workers, document),
            )
        )

    async def _positions(self, num_tokens: int) -> AsyncIterator[int]:
        """A block boundary, its neighbours, and random positions."""
        size = self._subject.block_size
        near = [position for position in (1, size - 1, size, size + 1, 2 * size) if position < num_tokens]
        random = self._random.integers(1, num_tokens, max(self._plan.num_handoffs - len(near), 0))
        for position in (near + [int(n) for n in random])[: self._plan.num_handoffs]:
            yield position

    def _tokens(self, num_tokens: int) -> Tokens:
        # Ids below 61 exist in every model here; the shipped one's special tokens lie above.
        return self._random.integers(0, min(self._subject.identity.vocab_size, 256), num_tokens).astype(np.uint32)

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
        self._report.add(
            Case(
                strategy="periodic(p)" if strategy.startswith("periodic") else strategy,
                plan=restored.plan,
                subject=self._subject.name,
                kv_format=self._subject.kv_format.value,
                hit_tokens=restored.hit_tokens,
                prompt_tokens=num_tokens,
                bound=bound,
                difference=difference,
                problem=problem,
            )
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
