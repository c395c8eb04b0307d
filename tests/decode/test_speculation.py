"""Drafting changes only the speed: outputs, stored bytes and hits are the same as without drafting."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from antefix.layout import KVFormat
from antefix.model import BlockPool, load_model
from antefix.model_dir import identify
from antefix.record import RecordKind
from antefix.sampling import Sampling
from antefix.secret import Keyring
from antefix.window import RestorePlanner, Sizes, parse
from antefix.window.rates import RatePriors
from antefix_decode import step as step_module
from antefix_decode.scheduler import Running, Scheduler
from antefix_decode.stopping import Stopper
from antefix_decode.token_choice import Sampler
from antefix_prefill.record_writer import RecordWriter
from antefix_prefill.run_prompt import run_prompt
from antefix_prefill.worker.compute_thread import ComputeThread
from antefix_prefill.worker.engine import Engine
from antefix_prefill.worker.resident_blocks import ResidentBlocks
from tests.engines import FixedRates, MemoryStore, prompt_of
from tests.model import released_checkpoint as released

PROMPT = np.random.default_rng(7).integers(0, 64, 130)
# Ends 16 tokens before a block does, so that every answer passes the boundary.
NEAR_AN_END = np.random.default_rng(8).integers(0, 64, 240)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return released.write("flash", tmp_path_factory.mktemp("speculation"), seed=4)


@pytest.fixture(scope="module")
def models(directory):
    return {drafts: load_model(directory, drafts=drafts) for drafts in (False, True)}


@pytest.fixture
def make_engine(models, directory):
    made = []

    def make(*, drafts: bool, store=None, strategy: str = "boundary", prefill_chunk: int = 64) -> Engine:
        model = models[drafts]
        identity = identify(directory, revision="test")
        pool = BlockPool(model.layout, 12)
        priors = RatePriors(prefill_tokens_per_s=200, load_bytes_per_s=1e12, load_fixed_s=1e-9)
        engine = Engine(
            identity=identity,
            model=model,
            pool=pool,
            blocks=ResidentBlocks(pool),
            store=store or MemoryStore(),
            strategy=parse(strategy),
            planner=RestorePlanner(Sizes.of(model.layout), FixedRates(priors)),
            keyring=Keyring(b"0123456789abcdef"),
            compute=ComputeThread("test"),
            prefill_chunk=prefill_chunk,
            fingerprint=identity.fingerprint(KVFormat.FP8).digest,
        )
        made.append(engine)
        return engine

    yield make
    for engine in made:
        engine.compute.close()


async def generate(engine, prompt, sampling):
    computed = await run_prompt(engine, prompt)
    sampler, stopper = Sampler(sampling), Stopper(sampling, frozenset())
    first = sampler.choose(computed.logits, prompt.num_tokens)
    shown = stopper.push(first)
    running = Running(
        prompt=prompt, sequence=computed.sequence, sampler=sampler, stopper=stopper, next_token=first,
        writer=RecordWriter(engine.store, engine.counters), prompt_tokens=prompt.num_tokens,
    )  # fmt: skip
    scheduler = Scheduler(engine, 8)
    scheduler.join(running)
    try:
        async for piece in scheduler.tokens(running):
            shown += piece.tokens
        await scheduler.store_end(running)
    finally:
        await scheduler.leave(running)
        await scheduler.close()
    return shown, scheduler


def guess(right: list[int], position_of_prompt_end: int, pattern: list[bool]):
    """A drafter that guesses right if the pattern is True, and wrong otherwise."""

    def draft(model, windows, next_tokens, ops):
        found = []
        for window in windows:
            # The draft state has moved on to the chosen token; the next one comes after it.
            state = window.draft
            state.end, state.streams = window.position, None
            number = window.position + 1 - position_of_prompt_end
            token = right[number] if number < len(right) else 0
            found.append(token if pattern[number % len(pattern)] else 63 - token)
        return found

    return draft


SAMPLINGS = {
    "greedy": Sampling(max_tokens=40, ignore_eos=True),
    "sampled": Sampling(max_tokens=30, ignore_eos=True, temperature=1.3, top_p=0.9, seed=11),
    "penalties": Sampling(max_tokens=30, ignore_eos=True, temperature=0.7, seed=3, repetition_penalty=1.4),
}


@pytest.mark.slow
@pytest.mark.parametrize("sampling", SAMPLINGS)
async def test_outputs_and_what_is_stored_are_those_without_drafting(make_engine, monkeypatch, sampling):
    plain, drafting = make_engine(drafts=False), make_engine(drafts=True)
    want, _ = await generate(plain, prompt_of(plain, NEAR_AN_END), SAMPLINGS[sampling])
    monkeypatch.setattr(step_module, "draft", guess(want, len(NEAR_AN_END), [True, True, False, True, False]))
    got, scheduler = await generate(drafting, prompt_of(drafting, NEAR_AN_END), SAMPLINGS[sampling])
    assert got == want
    assert 0 < scheduler.num_drafts_kept < scheduler.num_drafted
    assert scheduler.num_tokens == len(want) - 1
    blocks = {key for key in plain.store.records if key[0] is RecordKind.BLOCK}
    assert len(blocks) == 2
    assert {key for key in drafting.store.records if key[0] is RecordKind.BLOCK} == blocks
    for key, payload in plain.store.records.items():
        # With drafting, a checkpoint's last part is the draft state.
        assert drafting.store.records[key][: len(payload)] == payload
    assert drafting.blocks.num_available == drafting.pool.num_blocks


@pytest.mark.slow
async def test_its_own_drafts_change_nothing(make_engine):
    plain, drafting = make_engine(drafts=False), make_engine(drafts=True)
    sampling = Sampling(max_tokens=30, ignore_eos=True)
    want, _ = await generate(plain, prompt_of(plain, PROMPT), sampling)
    got, scheduler = await generate(drafting, prompt_of(drafting, PROMPT), sampling)
    assert got == want
    assert scheduler.num_drafted > 0


@pytest.mark.slow
@pytest.mark.parametrize("writes", [False, True])
async def test_hits_are_the_same_with_and_without_drafting(make_engine, writes):
    """A worker with drafting hits what one without drafting stored, and the reverse, with a cold run's logits."""
    store = MemoryStore()
    writer, reader = make_engine(drafts=writes, store=store), make_engine(drafts=not writes, store=store)
    longer = np.concatenate((PROMPT, PROMPT[:40]))
    first = await run_prompt(writer, prompt_of(writer, PROMPT))
    hit = await run_prompt(reader, prompt_of(reader, longer))
    fresh = make_engine(drafts=not writes)
    cold = await run_prompt(fresh, prompt_of(fresh, longer))
    assert (hit.report.plan, hit.report.hit_tokens) == ("checkpoint", 128)
    assert np.array_equal(hit.logits, cold.logits)
    assert first.report.hit_tokens == cold.report.hit_tokens == 0


@pytest.mark.slow
async def test_a_draft_state_comes_with_the_checkpoint(make_engine):
    store = MemoryStore()
    writer, reader = make_engine(drafts=True, store=store), make_engine(drafts=True, store=store)
    longer = np.concatenate((PROMPT, PROMPT[:3]))
    await run_prompt(writer, prompt_of(writer, PROMPT))
    hit = await run_prompt(reader, prompt_of(reader, longer))
    fresh = make_engine(drafts=True)
    cold = await run_prompt(fresh, prompt_of(fresh, longer))
    assert hit.report.hit_tokens == 128
    assert hit.sequence.window.to_bytes() == cold.sequence.window.to_bytes()
    assert hit.sequence.window.draft.first == 0


@pytest.mark.slow
async def test_a_draft_state_copied_inside_a_chunk_is_that_of_a_chunk_that_ends_there(make_engine):
    found = []
    for prefill_chunk in (256, 64):
        engine = make_engine(drafts=True, prefill_chunk=prefill_chunk)
        prompt = prompt_of(engine, PROMPT)
        computed = await run_prompt(engine, prompt)
        checkpoint = engine.store.records[RecordKind.CHECKPOINT, prompt.chain.hashes[0]]
        found.append((checkpoint, computed.sequence.window.to_bytes()))
    assert found[0] == found[1]


class GivenUniforms(Sampler):
    """A sampler that uses given random numbers at two positions."""

    def __init__(self, sampling, uniforms):
        super().__init__(sampling)
        self._given = uniforms

    def _uniform(self, position):
        return self._given[position]


def test_the_rule_of_acceptance_gives_the_distribution_of_sampling_one_by_one():
    """All pairs of 16 x 16 random numbers, whatever is drafted: counts are exactly p(first) * p(second | first)."""
    eighths = np.array([[1, 4, 3], [2, 2, 4], [5, 1, 2], [1, 6, 1]])  # after the prompt, token 0, 1 and 2
    logits = np.log(eighths / 8).astype(np.float32)
    grid = (np.arange(16) + 0.5) / 16
    for drafted in range(3):
        counts: Counter[tuple[int, int]] = Counter()
        for uniforms in itertools.product(grid, grid):
            sampler = GivenUniforms(Sampling(max_tokens=2, temperature=1.0, seed=0), uniforms)
            # As in a step: the main model has run the drafted token, and has the logits of the token after it.
            first = sampler.choose(logits[0], 0)
            behind = logits[1 + drafted] if drafted == first else logits[1 + first]
            counts[first, sampler.choose(behind, 1)] += 1
        for first, second in itertools.product(range(3), repeat=2):
            assert counts[first, second] == 256 * eighths[0, first] * eighths[1 + first, second] // 64


def test_a_model_without_the_layer_is_refused_by_its_setting(tmp_path: Path):
    from antefix.errors import ConfigError, ModelError
    from antefix_prefill.worker.engine import EngineConfig, build_engine

    secret = tmp_path / "secret"
    secret.write_text("00" * 32)
    secret.chmod(0o600)
    path = released.write("dspark", tmp_path / "model")
    config = EngineConfig(model=str(path), secret_file=str(secret), speculate="mtp")
    with pytest.raises(ModelError, match="DSpark's draft modules"):
        build_engine(config, MemoryStore())
    with pytest.raises(ConfigError, match="speculate"):
        EngineConfig(model=str(path), secret_file=str(secret), speculate="dspark")
