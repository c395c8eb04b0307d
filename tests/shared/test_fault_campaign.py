"""The campaign of faults keeps what each round found, and no fault meets what the fault before it left."""

import argparse
import contextlib
import itertools
import random

import numpy as np
import pytest

from benchmarks import faults
from benchmarks.faults import Campaign, conversations

ARGS = argparse.Namespace(
    rounds=3, minutes=5.0, seed=1, clients=0, undisturbed=1, quick=True, redis=False, max_tokens=4, pause_s=0.0
)
PROMPT = np.arange(5, dtype=np.uint32)


class Model:
    """In place of the bare model."""

    def __init__(self, *_: object) -> None:
        self.asked = 0

    def generate(self, prompt, max_tokens):
        self.asked += 1
        return [7] * max_tokens


class Nothing:
    """In place of a deployment."""

    processes = ()


@pytest.fixture
def kept():
    return []


@pytest.fixture
def begun():
    """The faults in their order, and where a look found the deployment not whole."""
    return []


@pytest.fixture
def campaign(monkeypatch, kept, begun):
    def fault(name):
        @contextlib.asynccontextmanager
        async def it(deployment, rng):
            begun.append(name)
            yield

        return it

    async def ask(prompt):
        made._answers.append((prompt, [7] * 4))
        return faults.time.monotonic()

    async def is_whole():
        return True

    monkeypatch.setattr(faults, "Reference", Model)
    monkeypatch.setattr(faults, "QUICK_SETTLE_S", 0.0)
    made = Campaign(
        ARGS,
        Nothing(),
        {name: fault(name) for name in ("kill router", "stop decode")},
        itertools.repeat(PROMPT),
        lambda: kept.append({name: len(times) for name, times in made.tally.recovery_s.items()}),
    )
    made._ask, made._is_whole = ask, is_whole
    return made


async def test_each_round_is_kept(campaign, kept, begun):
    await campaign.run()
    assert kept == [{"kill router": number, "stop decode": number} for number in (1, 2, 3)]
    assert (len(begun), campaign.tally.num_checked, campaign.reference.asked) == (6, 7, 1)


async def test_an_ended_run_has_kept_its_rounds(campaign, kept):
    save = campaign.save

    def end_after_two():
        save()
        if len(kept) == 2:
            raise RuntimeError("ended")

    campaign.save = end_after_two
    with pytest.raises(RuntimeError, match="ended"):
        await campaign.run()
    assert kept[-1] == {"kill router": 2, "stop decode": 2}


async def test_a_fault_waits_until_the_deployment_is_whole(campaign, begun):
    looks = iter([False, False, True] * 6)

    async def is_whole():
        found = next(looks)
        begun.append(found)
        return found

    campaign._is_whole = is_whole
    await campaign.run()
    assert len(begun) == 24
    assert all(
        begun[at : at + 3] == [False, False, True] and begun[at + 3] in campaign.faults for at in range(0, 24, 4)
    )


async def test_a_wrong_answer_is_counted_once(campaign):
    campaign._answers = [(PROMPT, [7] * 4), (PROMPT, [8] * 4)]
    campaign.check()
    campaign.check()
    assert (campaign.tally.num_checked, campaign.tally.num_wrong) == (2, 1)


def test_short_conversations_are_short():
    prompts = conversations(random.Random(1), num_max=300)
    lengths = [len(next(prompts)) for _ in range(200)]
    assert max(lengths) < 350
    prompts = conversations(random.Random(1))
    assert max(len(next(prompts)) for _ in range(200)) > 700
