"""Continuous batching: other requests never change an output, and no request waits for another one's slow reader."""

import asyncio
import contextlib
from types import SimpleNamespace

import numpy as np
import pytest

from antefix.errors import AntefixError, InvalidRequest, NotFinite, Overloaded, StepFailed, Unavailable
from antefix.record import RecordKind
from antefix.sampling import Sampling
from antefix.tokenizer import load_tokenizer
from antefix.v1 import decode_pb2
from antefix.wire import sampling_to_wire, tokens_from_wire, tokens_to_wire
from antefix_decode.logprobs import Logprobs
from antefix_decode.scheduler import Running, Scheduler
from antefix_decode.server import DecodeConfig, DecodeServicer
from antefix_decode.step import run_step
from antefix_decode.stopping import Stopper
from antefix_decode.token_choice import Sampler
from antefix_prefill.record_writer import RecordWriter
from antefix_prefill.run_prompt import run_prompt
from tests.engines import MODEL
from tests.waiting import AT_MOST_S, until

RNG = np.random.default_rng(3)
PROMPTS = [RNG.integers(0, 256, size) for size in (90, 130, 200)]
NUM_UNREAD = 20


async def start(engine, prompt, max_tokens, num_top_logprobs=None):
    sampling = Sampling(max_tokens=max_tokens, ignore_eos=True)
    computed = await run_prompt(engine, prompt)
    sampler, stopper = Sampler(sampling), Stopper(sampling, frozenset())
    first = sampler.choose(computed.logits, prompt.num_tokens)
    shown = stopper.push(first)
    running = Running(
        prompt=prompt,
        sequence=computed.sequence,
        sampler=sampler,
        stopper=stopper,
        writer=RecordWriter(engine.store, engine.counters),
        next_token=first,
        prompt_tokens=prompt.num_tokens,
        logprobs=Logprobs(num_top_logprobs),
    )
    return running, shown


async def finish(scheduler, running, shown):
    try:
        async for piece in scheduler.tokens(running):
            shown += piece.tokens
        await scheduler.store_end(running)
    finally:
        await scheduler.leave(running)
    return shown


async def generate(engine, scheduler, prompt, max_tokens):
    running, shown = await start(engine, prompt, max_tokens)
    scheduler.join(running)
    return await finish(scheduler, running, shown)


@pytest.mark.slow
async def test_a_batch_gives_what_each_gives_alone(make_engine, make_prompt):
    engine = make_engine()
    scheduler = Scheduler(engine, 8)
    alone = [await generate(engine, scheduler, make_prompt(engine, p), 10) for p in PROMPTS]
    together = await asyncio.gather(*(generate(engine, scheduler, make_prompt(engine, p), 10) for p in PROMPTS))
    assert together == alone
    assert scheduler.num_running == 0
    assert engine.blocks.num_available == engine.pool.num_blocks
    await scheduler.close()


@pytest.mark.slow
async def test_tokens_chosen_where_the_logits_are_are_the_same(make_engine, make_prompt, monkeypatch):
    """Tokens are chosen as on a card with shared launches. A sequence whose grammar fails ends without the others."""

    async def outputs(engine):
        scheduler = Scheduler(engine, 8)
        started = [await start(engine, make_prompt(engine, p), 6, num_top_logprobs=2) for p in PROMPTS]
        pieces = []
        for running, _ in started:
            scheduler.join(running)
        for running, _ in started:
            pieces.append([(p.tokens, p.logprobs) async for p in scheduler.tokens(running)])
            await scheduler.leave(running)
        await scheduler.close()
        return pieces, scheduler.num_tokens

    engine = make_engine()
    want = await outputs(engine)
    chosen = []
    monkeypatch.setattr("antefix_decode.scheduler.chooses_on_card", lambda engine: chosen.append(1) or True)
    got = await outputs(engine)
    assert chosen
    assert [[tokens for tokens, _ in of] for of in got[0]] == [[tokens for tokens, _ in of] for of in want[0]]
    tops = [[[t.top[0][0] for t in logprobs] for _, logprobs in of] for of in got[0]]
    assert tops == [[[t.top[0][0] for t in logprobs] for _, logprobs in of] for of in want[0]]
    assert got[1] == want[1]

    scheduler = Scheduler(engine, 8)
    (bad, _), (good, shown) = [await start(engine, make_prompt(engine, p), 6) for p in PROMPTS[:2]]

    def refuse(position, num_top):
        raise InvalidRequest("the output format is too complex")

    monkeypatch.setattr(bad, "sampler", type("Refusing", (), {"wish": staticmethod(refuse), "is_over": False})())
    scheduler.join(bad)
    scheduler.join(good)
    with pytest.raises(InvalidRequest, match="too complex"):
        await finish(scheduler, bad, [])
    await finish(scheduler, good, shown)
    assert shown[1:] == [token for tokens, _ in want[0][1] for token in tokens]
    await scheduler.close()


@pytest.mark.slow
async def test_the_next_turn_hits_the_models_own_answer(make_engine, make_prompt, store):
    engine = make_engine("boundary")
    scheduler = Scheduler(engine, 8)
    output = await generate(engine, scheduler, make_prompt(engine, PROMPTS[2]), 100)
    turn = np.concatenate((PROMPTS[2], output, PROMPTS[0][:20]))
    other = make_engine("boundary")
    hit = await run_prompt(other, make_prompt(other, turn))
    # 200 prompt + 99 output tokens were run (the last one was only chosen): four full blocks of 64.
    assert (hit.report.plan, hit.report.hit_tokens) == ("checkpoint", 256)
    store.records.clear()
    fresh = make_engine("boundary")
    cold = await run_prompt(fresh, make_prompt(fresh, turn))
    assert np.array_equal(hit.logits, cold.logits)
    await scheduler.close()


@pytest.mark.slow
async def test_log_probabilities_of_a_hit_are_those_of_a_cold_run(make_engine, make_prompt, store):
    async def logprobs_of(engine, tokens):
        scheduler = Scheduler(engine, 8)
        running, _ = await start(engine, make_prompt(engine, tokens), 30, num_top_logprobs=5)
        scheduler.join(running)
        found = []
        async for piece in scheduler.tokens(running):
            assert len(piece.logprobs) == len(piece.tokens)
            found += zip(piece.tokens, piece.logprobs, strict=True)
        await scheduler.leave(running)
        await scheduler.close()
        return found

    first, other = make_engine("zero"), make_engine("zero")
    cold = await logprobs_of(first, PROMPTS[2])
    assert (await run_prompt(other, make_prompt(other, PROMPTS[2]))).report.hit_tokens == 192
    assert await logprobs_of(other, PROMPTS[2]) == cold
    assert len(cold) == 29 and all(logprob.top[0] == (token, logprob.logprob) for token, logprob in cold)


@pytest.mark.slow
async def test_a_reader_that_stops_reading_stops_only_itself(make_engine, make_prompt, monkeypatch):
    # The bound is smaller than the real one, so that the test needs fewer steps.
    monkeypatch.setattr("antefix_decode.scheduler.NUM_UNREAD_MAX", NUM_UNREAD)
    engine = make_engine()
    scheduler = Scheduler(engine, 8)
    slow, shown = await start(engine, make_prompt(engine, PROMPTS[0]), NUM_UNREAD + 10)
    scheduler.join(slow)
    quick = await generate(engine, scheduler, make_prompt(engine, PROMPTS[1]), NUM_UNREAD + 20)
    assert len(quick) == NUM_UNREAD + 20
    await until(lambda: not slow.can_run)
    assert slow.unread.qsize() == NUM_UNREAD and not slow.done
    assert len(await finish(scheduler, slow, shown)) == NUM_UNREAD + 10
    await scheduler.close()


async def test_a_sequence_that_leaves_early_gives_its_blocks_back(make_engine, make_prompt):
    engine = make_engine()
    scheduler = Scheduler(engine, 8)
    running, _ = await start(engine, make_prompt(engine, PROMPTS[1]), 200)
    scheduler.join(running)
    await anext(aiter(scheduler.tokens(running)))
    await scheduler.leave(running)
    assert engine.blocks.num_available == engine.pool.num_blocks
    await scheduler.close()


@pytest.mark.slow
async def test_a_full_pool_fails_the_one_that_needs_more(make_engine, make_prompt):
    engine = make_engine(num_blocks=3)
    scheduler = Scheduler(engine, 8)
    running, shown = await start(engine, make_prompt(engine, PROMPTS[1]), 200)
    scheduler.join(running)
    with pytest.raises(Overloaded):
        await finish(scheduler, running, shown)
    await scheduler.close()


@pytest.mark.slow
async def test_outputs_leave_their_blocks_and_one_checkpoint(make_engine, make_prompt, store):
    engine = make_engine("boundary")
    scheduler = Scheduler(engine, 8)
    store.puts.clear()
    await generate(engine, scheduler, make_prompt(engine, PROMPTS[0]), 140)
    blocks = [position for kind, position in store.puts if kind is RecordKind.BLOCK]
    marks = [position for kind, position in store.puts if kind is RecordKind.CHECKPOINT]
    assert blocks == [64, 128, 192]
    assert marks == [64, 192]
    await scheduler.close()


async def test_an_unexpected_error_of_the_loop_fails_its_sequences_and_the_loop_goes_on(monkeypatch):
    """Without an engine: the step itself is replaced."""
    compute = SimpleNamespace(chunk_tenants=frozenset(), stepping_for=lambda shares: None)
    scheduler, steps = Scheduler(SimpleNamespace(compute=compute), 8), []

    async def step(batch):
        steps.append(batch)
        if len(steps) == 1:
            raise RuntimeError("nobody expected this")
        for running in batch:
            running.done = True
            running.unread.put_nowait(None)

    def running():
        parts = dict.fromkeys(("prompt", "sequence", "sampler", "stopper", "writer"))
        return Running(**parts, next_token=0, prompt_tokens=1)

    monkeypatch.setattr(scheduler, "_step", step)
    monkeypatch.setattr("antefix.keep_running.AGAIN_S", 0.0)
    async with scheduler.place() as place, asyncio.timeout(300):
        for fails in (True, False):
            one = running()
            one.place = place
            scheduler.join(one)
            with pytest.raises(StepFailed) if fails else contextlib.nullcontext():
                assert [token async for token in scheduler.tokens(one)] == []
            scheduler._running.remove(one)
    await scheduler.close()


async def test_no_more_are_let_in_than_may_run(make_engine):
    scheduler = Scheduler(make_engine(), 2)
    async with scheduler.place():
        with pytest.raises(Overloaded):
            async with scheduler.place(), scheduler.place():
                pass
        async with scheduler.place():
            pass


async def test_who_waits_gets_a_place_in_turn_by_tenant(make_engine):
    scheduler, order = Scheduler(make_engine(), 1, 8), []

    async def ask(tenant):
        async with scheduler.place(tenant, 100):
            order.append(tenant)
            await asyncio.sleep(0)

    async with scheduler.place("greedy", 100):
        tasks = [asyncio.create_task(ask(tenant)) for tenant in (*["greedy"] * 5, "modest")]
        await asyncio.sleep(0)
        assert scheduler.num_waiting == 6
    await asyncio.gather(*tasks)
    assert order.index("modest") == 0 and scheduler.num_placed == 0


@pytest.mark.slow
async def test_one_sequence_that_fails_does_not_stop_the_others(make_engine, make_prompt):
    class Broken:
        def choose(self, logits, position):
            raise FloatingPointError("no token can be chosen")

    engine = make_engine()
    scheduler = Scheduler(engine, 8)
    bad, shown = await start(engine, make_prompt(engine, PROMPTS[0]), 50)
    bad.sampler = Broken()
    scheduler.join(bad)
    good = asyncio.create_task(generate(engine, scheduler, make_prompt(engine, PROMPTS[1]), 40))
    with pytest.raises(AntefixError, match="a step of the model failed"):
        await asyncio.wait_for(finish(scheduler, bad, shown), AT_MOST_S)
    assert len(await asyncio.wait_for(good, AT_MOST_S)) == 40
    assert engine.blocks.num_available == engine.pool.num_blocks
    await scheduler.close()


@pytest.mark.slow
async def test_a_step_that_fails_for_one_runs_for_the_others(make_engine, make_prompt, monkeypatch):
    engine = make_engine()
    alone = await generate(engine, first := Scheduler(engine, 8), make_prompt(engine, PROMPTS[1]), 12)
    await first.close()
    scheduler = Scheduler(engine, 8)
    bad, shown = await start(engine, make_prompt(engine, PROMPTS[0]), 12)

    def step(engine, items):
        if any(sequence is bad.sequence and sequence.position > PROMPTS[0].size + 3 for sequence, _, _ in items):
            raise RuntimeError("size of tensor a (7) must match tensor b")
        return run_step(engine, items)

    monkeypatch.setattr("antefix_decode.scheduler.run_step", step)
    scheduler.join(bad)
    good = asyncio.create_task(generate(engine, scheduler, make_prompt(engine, PROMPTS[1]), 12))
    async with asyncio.timeout(AT_MOST_S):
        # The error says that another worker may be tried, and does not quote torch.
        with pytest.raises(Unavailable, match="a step of the model failed; the worker's log has it"):
            await finish(scheduler, bad, shown)
        assert await good == alone
    assert len(shown) == 5
    await scheduler.close()


@pytest.mark.slow
async def test_logits_that_are_no_numbers_end_their_own_sequence_only(make_engine, make_prompt, monkeypatch):
    engine = make_engine()
    scheduler = Scheduler(engine, 8)
    bad, shown = await start(engine, make_prompt(engine, PROMPTS[0]), 12)

    def step(engine, items):
        steps = run_step(engine, items)
        for (sequence, _, _), stepped in zip(items, steps, strict=True):
            if sequence is bad.sequence:
                stepped.logits[0, 7] = np.nan
        return steps

    monkeypatch.setattr("antefix_decode.scheduler.run_step", step)
    scheduler.join(bad)
    good = asyncio.create_task(generate(engine, scheduler, make_prompt(engine, PROMPTS[1]), 6))
    async with asyncio.timeout(AT_MOST_S):
        with pytest.raises(NotFinite):
            await finish(scheduler, bad, shown)
        assert len(await good) == 6
    await scheduler.close()


KNOBS = {
    "temperature": 1.3,
    "top_p": 0.95,
    "top_k": 50,
    "min_p": 0.01,
    "seed": 11,
    "presence_penalty": 0.5,
    "frequency_penalty": 0.3,
    "repetition_penalty": 1.2,
    "logit_bias": ((101, 2.0), (32, -5.0)),
    "min_tokens": 20,
    "stop_token_ids": (46,),
}
DIGITS = 'start: /([0-9]{1,3}, ){12}/ "end"\n'


async def served(servicer, tokens, sampling, handoff=b"", emitted=()):
    """The result of the worker's own call: (tokens, finish reason, hit tokens of the restore)."""
    request = decode_pb2.DecodeRequest(
        prompt=tokens_to_wire(np.concatenate((tokens, np.array(emitted, np.uint32)))),
        sampling=sampling_to_wire(sampling),
        handoff=handoff,
        num_emitted=len(emitted),
    )
    output, reason, hit = list(emitted), "", 0
    async for answer in servicer.Decode(request, None):
        output += tokens_from_wire(answer.tokens).tolist()
        reason = answer.finish_reason or reason
        hit = max(hit, answer.restore.hit_tokens)
    return output, reason, hit


def servicer_of(engine, **settings):
    config = DecodeConfig(model=str(MODEL), store_address="-", secret_file="-", **settings)
    return DecodeServicer(engine, load_tokenizer(MODEL), config)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"grammar": DIGITS},
        {"stop": ((101, 32), (116, 104)), "ignore_eos": True},
    ],
    ids=str,
)
async def test_a_hit_and_a_continued_output_are_a_cold_runs(make_engine, store, settings):
    """All settings are on. Runs cold, from the store on another worker, and from the middle on a third worker."""
    sampling = Sampling(max_tokens=24, **{**KNOBS, **settings})
    tokens = PROMPTS[2].astype(np.uint32)
    first, second, third = (servicer_of(make_engine("zero")) for _ in range(3))
    cold, reason, hit = await served(first, tokens, sampling)
    assert hit == 0 and len(cold) >= 20 and reason in ("stop", "length")
    again, reason_again, hit = await served(second, tokens, sampling)
    assert hit == 192 and (again, reason_again) == (cold, reason)
    for cut in (1, len(cold) // 2):
        assert (await served(third, tokens, sampling, emitted=cold[:cut]))[:2] == (cold, reason)
    for servicer in (first, second, third):
        await servicer.scheduler.close()


@pytest.mark.slow
async def test_a_grammar_that_fails_ends_its_own_sequence_alone(make_engine):
    servicer = servicer_of(make_engine())
    tokens = PROMPTS[0].astype(np.uint32)
    plain = Sampling(max_tokens=30, ignore_eos=True)
    alone = (await served(servicer, tokens, plain))[0]
    with pytest.raises(InvalidRequest):
        await served(servicer, tokens, Sampling(max_tokens=30, grammar="start: nothing"))
    bad = Sampling(max_tokens=30, grammar='start: "abcdefgh"')
    good = asyncio.create_task(served(servicer, tokens, plain))
    failing = asyncio.create_task(served(servicer, tokens, bad))
    while not servicer.scheduler.num_running:  # noqa: ASYNC110 - the loop of the scheduler is what is waited for
        await asyncio.sleep(0)
    for running in servicer.scheduler._running:
        if running.sampler._constraint is not None:
            running.sampler._constraint._matcher.consume_token(0)  # from here on its matcher is broken
    assert (await good)[0] == alone
    await asyncio.gather(failing, return_exceptions=True)
    assert servicer.scheduler.num_running == 0
    await servicer.scheduler.close()


@pytest.mark.slow
async def test_what_a_request_needs_is_loaded_while_it_waits_for_a_place(make_engine):
    """The only place is taken. When the request's turn comes, its stored prefix is in memory.

    Its answer equals a cold run.
    """
    sampling, tokens = Sampling(max_tokens=4, ignore_eos=True), PROMPTS[2].astype(np.uint32)
    first, second = servicer_of(make_engine("zero")), servicer_of(make_engine("zero"), num_running_max=1)
    cold = await served(first, tokens, sampling)
    async with second.scheduler.place():
        waiting = asyncio.create_task(served(second, tokens, sampling))
        await until(lambda: second.prefetcher.counters.num_prefetched)
        assert not waiting.done() and second.scheduler.num_waiting == 1
    output, _, hit = await waiting
    assert (output, hit) == (cold[0], 192)
    assert second.prefetcher.counters.num_blocks_prefetched == 192 // 64
    for servicer in (first, second):
        await servicer.scheduler.close()
