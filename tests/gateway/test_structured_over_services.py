"""Real processes: forced calls, all settings at once, several outputs, hits, a killed worker."""

import json

import jsonschema
import pytest

from antefix.sampling import Sampling
from antefix_billing.ledger_files import read_settled
from antefix_console.deployment import Deployment, DeploymentConfig
from tests.on_demand import openai
from tests.small_worker_model import small_worker_model

MODEL = "antefix-tiny"
BLOCK = 64
pytestmark = pytest.mark.services
SMALL_POOL = ("--pool-bytes", "64M")
TOOL = {
    "name": "sky",
    "parameters": {
        "type": "object",
        "properties": {
            "city": {"type": "string", "minLength": 3, "maxLength": 8},
            "days": {"type": "array", "items": {"type": "integer", "minimum": 1, "maximum": 31}, "maxItems": 3},
        },
        "required": ["city", "days"],
        "additionalProperties": False,
    },
}
KNOBS = {
    "model": MODEL,
    "temperature": 1.2,
    "seed": 4,
    "presence_penalty": 0.4,
    "frequency_penalty": 0.2,
    "logit_bias": {"101": 1.5},
}
MORE = {"top_k": 40, "min_p": 0.01, "repetition_penalty": 1.1, "min_tokens": 30}
CALL = {
    **KNOBS,
    "messages": [{"role": "user", "content": "How is Bern?"}],
    "tools": [{"type": "function", "function": TOOL}],
    "tool_choice": "required",
    "parallel_tool_calls": False,
    "reasoning_effort": "none",
    "max_tokens": 600,
    "extra_body": MORE,
}
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "string", "minLength": 40, "maxLength": 60}, "b": {"type": "boolean"}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
COMPLETION = {
    **KNOBS,
    "prompt": "Eleven pipers piping. " * 10,
    "max_tokens": 600,
    "extra_body": {
        **MORE,
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}},
    },
}


@pytest.fixture
def config(tmp_path):
    return DeploymentConfig(
        model=small_worker_model(),
        data_dir=tmp_path / "data",
        http_address="127.0.0.1:0",
        num_decode=2,
        extra_flags={
            "kvstore": ("--budget-bytes", "256M"),
            "prefill": SMALL_POOL,
            "decode": SMALL_POOL,
            "router": ("--chat-format", "deepseek-v4"),
        },
    )


async def test_forced_output_is_the_same_cold_as_a_hit_and_continued_after_a_workers_end(config):
    async with Deployment(config) as deployment:
        url = "http://" + deployment.one("router").http_address
        async with openai.AsyncOpenAI(base_url=url + "/v1", api_key="-", max_retries=0) as client:
            cold, hit = [await client.chat.completions.create(**CALL) for _ in range(2)]
            whole = await client.completions.create(**COMPLETION)
            text, num_chunks = "", 0
            async for chunk in await client.completions.create(**COMPLETION, stream=True):
                text += "".join(choice.text for choice in chunk.choices)
                num_chunks += 1
                if num_chunks == 20:
                    # The router places the request on the worker that has the prompt in memory, which served the
                    # previous request.
                    await deployment.kill(deployment.one("decode"))
        records = [item.record for item in read_settled(deployment.config.ledger_dir)]
    (call,), (again,) = cold.choices[0].message.tool_calls, hit.choices[0].message.tool_calls
    jsonschema.validate(json.loads(call.function.arguments), TOOL["parameters"])
    assert cold.choices[0].finish_reason == "tool_calls" and cold.usage.prompt_cache_hit_tokens == 0
    assert again.function.arguments == call.function.arguments
    assert hit.usage.prompt_cache_hit_tokens >= cold.usage.prompt_tokens // BLOCK * BLOCK - BLOCK
    jsonschema.validate(json.loads(text), SCHEMA)
    assert text == whole.choices[0].text and num_chunks > 40
    assert [record.status.value for record in records] == ["stop"] * 4
    assert records[3].output_tokens == records[2].output_tokens


async def test_several_outputs_share_one_prefill(running):
    prompt = "Twelve drummers drumming, eleven pipers piping. " * 8
    settings = {"model": MODEL, "prompt": prompt, "max_tokens": 30, "temperature": 1.0, "seed": 7}
    before = (await running.router.status()).counters
    async with openai.AsyncOpenAI(base_url=running.url + "/v1", api_key="-", max_retries=0) as client:
        several = await client.completions.create(**settings, n=3)
        counters = (await running.router.status()).counters
        single = [await client.completions.create(**{**settings, "seed": 7 + number}) for number in range(3)]
    texts, usage = ["", "", ""], None
    sampling = Sampling(max_tokens=30, temperature=1.0, seed=7)
    async for message in running.router.generate(prompt, sampling, num_samples=3):
        texts[message.sample] += message.text
        usage = message.usage or usage
    records = [item.record for item in running.settled()]
    assert [choice.text for choice in several.choices] == [each.choices[0].text for each in single] == texts
    assert (counters.led - before.led, counters.straight - before.straight) == (1, 0)
    assert several.usage.prompt_tokens == len(prompt) == usage.prompt_tokens
    assert several.usage.completion_tokens == sum(each.usage.completion_tokens for each in single)
    assert len(records) == 5 and records[0].prompt_tokens == len(prompt)
    assert records[0].output_tokens == several.usage.completion_tokens == usage.output_tokens
