"""Runs one prompt through the workers' own code, restored by a given kind of plan."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from antefix.block import exactness_of
from antefix.clients import Tokens
from antefix.errors import AntefixError
from antefix.model import BlockPool, Sequence, WindowState, forward
from antefix.model.backend import make_backend
from antefix.model.ops import Ops
from antefix.secret import Keyring
from antefix.store.api import Store
from antefix.window import Decision, PlanKind, Rates, RestorePlanner, Sizes, StoredPrefix, parse
from antefix_console.verify.compare import RunOutcome
from antefix_console.verify.models import Subject
from antefix_console.verify.stores import EmptyStore
from antefix_decode.adopt import adopt, take_handoff
from antefix_decode.store_output import store_end, store_token
from antefix_prefill.leave_handoff import leave_handoff
from antefix_prefill.record_writer import RecordWriter
from antefix_prefill.restore import Prompt
from antefix_prefill.run_prompt import grow, run_prompt
from antefix_prefill.worker.compute_thread import ComputeThread
from antefix_prefill.worker.engine import Engine
from antefix_prefill.worker.resident_blocks import ResidentBlocks

_SECRET = b"antefix verify: names only"


class FixedPlanner(RestorePlanner):
    """Always takes the best plan of one kind, at any cost; runs cold if there is no plan of that kind."""

    def __init__(self, sizes: Sizes, kind: PlanKind, *, align_tokens: int = 1) -> None:
        super().__init__(sizes, Rates(), align_tokens=align_tokens)
        self._kind = kind

    def plan(self, stored: StoredPrefix) -> Decision:
        decision = super().plan(stored)
        wanted = next((plan for plan in decision.plans if plan.kind is self._kind), decision.cold)
        return Decision(plan=wanted, plans=decision.plans)


@dataclass(slots=True)
class WorkerPair:
    """Makes workers, one after another, over one loaded model. Each new worker begins with an empty memory.

    kernels, reproducible: as in a worker's settings.
    """

    subject: Subject
    compute: ComputeThread
    prefill_chunk: int
    kernels: str = "auto"
    reproducible: bool = True

    def backend(self, num_blocks: int) -> tuple[BlockPool, Ops]:
        """A block pool for the model, and the operations on it."""
        model = self.subject.model
        return make_backend(
            self.kernels, model.layout, num_blocks, model.device, reproducible=self.reproducible, lead=model.lead
        )

    def new(
        self,
        store: Store,
        num_tokens: int,
        *,
        strategy: str = "boundary",
        kind: PlanKind = PlanKind.COLD,
        bounded_windows: int = 0,
    ) -> Engine:
        """A worker whose block pool has room for `num_tokens` tokens. Each strategy has its own namespace."""
        subject, layout = self.subject, self.subject.model.layout
        num_blocks = -(-num_tokens // subject.block_size) + 1
        pool, ops = self.backend(num_blocks)
        fingerprint = subject.identity.fingerprint(
            subject.kv_format, namespace=strategy, exactness=exactness_of(bounded_windows)
        )
        return Engine(
            identity=subject.identity,
            model=subject.model,
            pool=pool,
            blocks=ResidentBlocks(pool),
            store=store,
            strategy=parse(strategy),
            planner=FixedPlanner(Sizes.of(layout), kind),
            keyring=Keyring(_SECRET),
            compute=self.compute,
            prefill_chunk=self.prefill_chunk,
            fingerprint=fingerprint.digest,
            bounded_windows=bounded_windows,
            ops=ops,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RestoredRun:
    """The outcome of a prompt's run, and how the prompt was restored ("cold", "checkpoint", "replay", "bounded-K")."""

    outcome: RunOutcome
    plan: str
    hit_tokens: int


async def run(engine: Engine, tokens: Tokens) -> RestoredRun:
    """Restore, compute and store the prompt. After the run, the pool is empty again."""
    computed = await run_prompt(engine, prompt_of(engine, tokens))
    outcome = RunOutcome.of(engine, computed.sequence, computed.logits)
    engine.blocks.release(computed.sequence.block_table)
    return RestoredRun(outcome=outcome, plan=computed.report.plan, hit_tokens=computed.report.hit_tokens)


async def run_cold(workers: WorkerPair, tokens: Tokens) -> RunOutcome:
    """Run the prompt without any store."""
    return (await run(workers.new(EmptyStore(), len(tokens)), tokens)).outcome


@dataclass(slots=True)
class _Output:
    """A sequence that is being generated, as a decode worker represents it."""

    prompt: Prompt
    sequence: Sequence
    writer: RecordWriter
    prompt_tokens: int
    boundary_window: WindowState | None = None


async def generate(engine: Engine, tokens: Tokens, num_tokens: int) -> Tokens:
    """Prefill, then decode greedily and store the output as a decode worker does. Returns prompt and output tokens."""
    prompt = prompt_of(engine, tokens)
    computed = await run_prompt(engine, prompt)
    writer = RecordWriter(engine.store, engine.counters, engine.window_pool)
    output = _Output(prompt, computed.sequence, writer, prompt.num_tokens)
    logits, produced = computed.logits, []
    for _ in range(num_tokens):
        token = int(logits.argmax())
        logits = await step(engine, output.sequence, token)
        await store_token(engine, output, token)
        produced.append(token)
    await store_end(engine, output)
    engine.blocks.release(output.sequence.block_table)
    return np.concatenate((tokens, np.array(produced, np.uint32)))


async def step(engine: Engine, sequence: Sequence, token: int) -> npt.NDArray[np.float32]:
    """Run one token. Returns logits [V] float32."""
    grow(engine, sequence, sequence.position + 1)
    batch = [(sequence, np.array([token], np.uint32))]
    out = await engine.compute.run(forward, engine.model, engine.pool, batch, ops=engine.ops)
    logits: npt.NDArray[np.float32] = out[0].float().cpu().numpy()
    return logits


async def hand_over(workers: WorkerPair, store: Store, tokens: Tokens, next_token: int) -> RunOutcome | None:
    """Prefill in one worker, adopt the handoff in another worker, and run one more token there; None if a part of the
    state was lost.
    """
    prefill = workers.new(store, len(tokens))
    computed = await run_prompt(prefill, prompt_of(prefill, tokens))
    name = await leave_handoff(prefill, computed)
    prefill.blocks.release(computed.sequence.block_table)
    decode = workers.new(store, len(tokens) + 1)
    prompt = prompt_of(decode, tokens)
    handoff = await take_handoff(decode, prompt, name)
    adopted = None if handoff is None else await adopt(decode, prompt, handoff)
    if adopted is None:
        return None
    if not np.array_equal(adopted.logits, computed.logits):
        raise AntefixError("the logits in a handoff changed between prefill and decode")
    return await _one_more(decode, adopted.sequence, next_token)


async def cold_and_one_more(workers: WorkerPair, tokens: Tokens, next_token: int) -> RunOutcome:
    """The expected outcome of `hand_over`: one worker, no store."""
    engine = workers.new(EmptyStore(), len(tokens) + 1)
    computed = await run_prompt(engine, prompt_of(engine, tokens))
    return await _one_more(engine, computed.sequence, next_token)


async def _one_more(engine: Engine, sequence: Sequence, token: int) -> RunOutcome:
    logits = await step(engine, sequence, token)
    outcome = RunOutcome.of(engine, sequence, logits)
    engine.blocks.release(sequence.block_table)
    return outcome


def prompt_of(engine: Engine, tokens: Tokens) -> Prompt:
    chain = engine.chain("")
    chain.extend(tokens)
    return Prompt(tokens=tokens, chain=chain)
