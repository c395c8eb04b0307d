"""Operators see the predictions and outcomes of plans, and switch strategies while requests run."""

import dataclasses
import json

import numpy as np
import pytest

from antefix import rpc
from antefix.clients import WindowClient
from antefix.errors import InvalidRequest
from antefix.record import RecordKind
from antefix.v1 import window_pb2
from antefix_console.cli import main
from antefix_prefill.run_prompt import run_prompt
from antefix_prefill.worker.window_service import add_window_service

RNG = np.random.default_rng(21)
TURN = RNG.integers(0, 256, 650)
NEXT = np.concatenate((TURN, RNG.integers(0, 256, 90)))


async def answer(engine, prompt):
    computed = await run_prompt(engine, prompt)
    engine.blocks.release(computed.sequence.block_table)
    return computed


@pytest.fixture
async def served(make_engine):
    engine = make_engine("zero")
    server = await rpc.start_server(
        "127.0.0.1:0", lambda target: add_window_service(engine, target), [window_pb2.DESCRIPTOR]
    )
    yield engine, server.address
    await server.server.stop(0)


async def test_plans_are_recorded_with_prediction_and_outcome(served, make_prompt):
    engine, address = served
    await answer(engine, make_prompt(engine, TURN))
    await answer(engine, make_prompt(engine, NEXT))
    status = await WindowClient(address).status(num_plans_max=8)
    first, second = status.plans
    assert (first.taken.kind, first.prompt_tokens, first.taken.prefill_tokens) == ("cold", 650, 650)
    assert second.taken.kind == "replay" and second.taken.resume_tokens == 640
    assert {way.kind for way in second.weighed} == {"cold", "replay"}
    assert all(plan.actual_s > 0 and plan.taken.predicted_s > 0 for plan in status.plans)
    kinds = {kind.kind: kind for kind in status.kinds}
    assert kinds["replay"].num_outcomes == kinds["cold"].num_outcomes == 1
    expected = abs(second.actual_s - second.taken.predicted_s) / second.taken.predicted_s
    assert kinds["replay"].mean_error == pytest.approx(expected)
    assert len((await WindowClient(address).status(num_plans_max=1)).plans) == 1
    assert not (await WindowClient(address).status()).plans


async def test_a_strategy_is_switched_from_the_next_request_on(served, make_prompt, store):
    engine, address = served
    await answer(engine, make_prompt(engine, TURN))
    assert not [kind for kind, _ in store.puts if kind is RecordKind.CHECKPOINT]
    assert await WindowClient(address).set_strategy("boundary") == "zero"
    assert (await WindowClient(address).status()).strategy == "boundary"
    await answer(engine, make_prompt(engine, NEXT))
    assert [position for kind, position in store.puts if kind is RecordKind.CHECKPOINT] == [704]


async def test_an_unknown_strategy_changes_nothing(served):
    _, address = served
    with pytest.raises(InvalidRequest, match="periodic"):
        await WindowClient(address).set_strategy("sometimes")
    assert (await WindowClient(address).status()).strategy == "zero"


@pytest.mark.slow
@pytest.mark.parametrize("before", ["full", "periodic(128)", "boundary", "auto", "zero"])
@pytest.mark.parametrize("after", ["auto", "zero"])
async def test_what_one_strategy_stored_another_one_uses(make_engine, make_prompt, store, before, after):
    first, second = make_engine(before), make_engine(after)
    await answer(first, make_prompt(first, TURN))
    hit = await answer(second, make_prompt(second, NEXT))
    assert hit.report.plan == ("replay" if before == "zero" else "checkpoint")
    assert hit.report.hit_tokens == 640


def test_the_command_refuses_what_it_cannot_do(capsys):
    assert main(["window"]) == 2
    assert main(["window", "--worker", "127.0.0.1:1", "--strategy", "sometimes"]) == 2
    assert "sometimes" in capsys.readouterr().err


def test_the_command_tells_of_a_worker_that_is_not_there(capsys):
    assert main(["window", "--worker", "127.0.0.1:1"]) == 3
    assert "the service cannot be reached: failed to connect" in capsys.readouterr().err


async def test_the_command_prints_what_a_worker_says(served, make_prompt, capsys):
    from argparse import Namespace

    from antefix_console.commands import window

    engine, address = served
    await answer(engine, make_prompt(engine, TURN))
    args = Namespace(router=None, worker=[address], strategy="auto", plans=4, json=True)
    statuses = await window._ask(args)
    shown = dataclasses.asdict(statuses[address])
    assert shown["strategy"] == "auto" and shown["plans"][0]["taken"]["kind"] == "cold"
    json.dumps(shown)
    window._print(statuses)
    assert "strategy auto" in capsys.readouterr().out
