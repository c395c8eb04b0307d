"""The main job over four real processes: hits from memory and disk change no token and are billed correctly."""

import asyncio

import numpy as np
import pytest

from antefix.sampling import Sampling
from tests.waiting import until

pytestmark = pytest.mark.services


QUESTIONS = [np.frombuffer(text, np.uint8).astype(np.uint32) for text in (b"What?", b"Who is it?", b"And why so?")]


def count(last):
    return last.usage.cache_hit_tokens, last.restore.plan


async def test_hits_from_memory_from_the_answer_and_from_disk_equal_cold_runs(
    deploy, ask, document, small_model, small_reference
):
    asked = []
    # Answers of 24 tokens, also where the model would end them before.
    sampling = Sampling(max_tokens=24, ignore_eos=True)
    async with deploy(model=small_model) as deployment:
        first = np.concatenate((document, QUESTIONS[0]))
        output, last = await ask(deployment, first, sampling=sampling)
        assert count(last) == (0, "cold")
        asked.append((first, output))
        # The prompt has 2,558 tokens, so the answer's first two tokens fill a block.
        second = np.concatenate((document, document[:52], QUESTIONS[1][:6]))
        output, last = await ask(deployment, second, sampling=sampling)
        assert last.usage.cache_hit_tokens >= 2432  # all full blocks of the shared 2,500 tokens, or one less
        asked.append((second, output))
        third = np.concatenate((second, np.array(output, np.uint32), QUESTIONS[2]))
        output, last = await ask(deployment, third, sampling=sampling)
        # The second turn ran 2,558 prompt and 23 output tokens: 40 full blocks of 64, the last of which has answer
        # tokens.
        assert count(last) == (2560, "checkpoint")
        asked.append((third, output))
    async with deploy(model=small_model) as deployment:
        output, last = await ask(deployment, third, sampling=sampling)
        assert count(last) == (2560, "checkpoint")
        assert last.restore.hit_store_tokens == 2560 and last.restore.bytes_read > 0
        asked.append((third, output))
    for prompt, output in asked:
        expected = small_reference.generate(prompt, 24)
        assert expected and output[: len(expected)] == expected


async def test_without_checkpoints_a_hit_is_replayed_and_equal(deploy, ask, document, small_model, small_reference):
    async with deploy(model=small_model, strategy="zero") as deployment:
        await ask(deployment, document)
        prompt = np.concatenate((document, QUESTIONS[1]))
        output, last = await ask(deployment, prompt)
        assert count(last) == (2496, "replay")
        assert last.restore.replayed_tokens > 0
    assert output == small_reference.generate(prompt, 24)


async def test_usage_adds_up_whatever_happens(running, ask, document):
    for length in (1, 63, 64, 65, 128, 500, 500):
        output, last = await ask(running, document[:length], max_tokens=3, tenant="sums")
        usage = last.usage
        assert usage.prompt_tokens == length == usage.cache_hit_tokens + usage.cache_miss_tokens
        assert usage.cache_hit_tokens % 64 == 0
        assert usage.output_tokens == len(output)


async def test_concurrent_requests_get_their_own_answers(deploy, ask, document, small_model, small_reference):
    prompts = [np.concatenate((document[: 300 + 64 * i], QUESTIONS[i % 3])) for i in range(8)]
    async with deploy(num_decode=2, model=small_model) as deployment:
        answers = await asyncio.gather(*(ask(deployment, prompt, max_tokens=16) for prompt in prompts))
        answers += await asyncio.gather(*(ask(deployment, prompt, max_tokens=16) for prompt in prompts))
        await until_idle(deployment)
    expected = [small_reference.generate(prompt, 16) for prompt in prompts]
    assert [output for output, _ in answers] == expected * 2


async def until_idle(deployment):
    """Wait until no role counts a running request, after all have ended."""

    async def is_idle():
        status = await deployment.router.status()
        return all(worker.num_requests == 0 and worker.num_tokens_queued == 0 for worker in status.workers)

    await until(is_idle)


async def test_a_cancelled_client_stops_the_work(running, ask, document):
    stream = running.router.generate(document, Sampling(max_tokens=5000, ignore_eos=True))
    await anext(aiter(stream))
    await stream.aclose()
    await until_idle(running)
    output, _ = await ask(running, document[:100], max_tokens=4)
    assert len(output) <= 4


async def test_tenants_are_strangers_to_each_other(running, ask, document):
    await ask(running, document, max_tokens=2, tenant="one")
    _, other = await ask(running, document, max_tokens=2, tenant="two")
    _, same = await ask(running, document, max_tokens=2, tenant="one")
    assert other.usage.cache_hit_tokens == 0
    assert same.usage.cache_hit_tokens > 0


@pytest.mark.parametrize("temperature", [0.0, 1.0])
async def test_a_stop_sequence_ends_the_output_and_is_not_in_it(running, ask, document, temperature):
    sampling = Sampling(max_tokens=40, temperature=temperature, seed=5, ignore_eos=True)
    whole, _ = await ask(running, document[:200], sampling=sampling)
    stop = tuple(whole[7:10])
    cut = Sampling(max_tokens=40, temperature=temperature, seed=5, ignore_eos=True, stop=(stop,))
    output, last = await ask(running, document[:200], sampling=cut)
    assert last.finish_reason == "stop"
    first = next(i for i in range(len(whole)) if tuple(whole[i : i + 3]) == stop)
    assert output == whole[:first]
