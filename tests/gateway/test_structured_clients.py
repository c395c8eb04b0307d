"""Real clients ask for response formats, forced calls and several outputs. The workers draw random allowed tokens."""

import json
from typing import Literal

import jsonschema
import pytest

from antefix_billing.ledger_files import read_settled
from tests.gateway.obedient import Obedient
from tests.gateway.scripted import Script, make_front, serving
from tests.on_demand import agents, anthropic, openai

pydantic = pytest.importorskip("pydantic")

# A separate process tries out grammars.
pytestmark = pytest.mark.services
MODEL = "antefix-tiny"
ASK = [{"role": "user", "content": "How is Bern?"}]
WEATHER = {
    "name": "weather",
    "description": "The weather.",
    "parameters": {
        "type": "object",
        "properties": {
            "city": {"type": "string", "maxLength": 8},
            "days": {"type": "integer", "minimum": 1, "maximum": 9},
            "unit": {"enum": ["c", "f"]},
        },
        "required": ["city", "days"],
        "additionalProperties": False,
    },
}
CLOCK = {"name": "clock", "parameters": {"type": "object", "properties": {}}}
TOOLS = [{"type": "function", "function": each} for each in (WEATHER, CLOCK)]
FLAT_TOOLS = [{"type": "function", **each} for each in (WEATHER, CLOCK)]
THEIR_TOOLS = [{"name": each["name"], "input_schema": each["parameters"]} for each in (WEATHER, CLOCK)]
SCHEMAS = {each["name"]: each["parameters"] for each in (WEATHER, CLOCK)}
V4 = {"chat_format": "deepseek-v4"}


class Forecast(pydantic.BaseModel):
    city: Literal["Bern", "Basel"]
    degrees: list[int] = pydantic.Field(max_length=3)
    rain: bool
    note: str | None = pydantic.Field(max_length=6)


@pytest.fixture
def workers():
    return Obedient()


@pytest.fixture
def front(workers, tmp_path):
    return make_front(workers, ledger=tmp_path / "ledger")


def records(tmp_path):
    return [item.record for item in read_settled(tmp_path / "ledger")]


def openai_client(url):
    return openai.AsyncOpenAI(base_url=url + "/v1", api_key="-", max_retries=0)


def anthropic_client(url):
    return anthropic.AsyncAnthropic(base_url=url, api_key="-", max_retries=0)


@pytest.mark.parametrize("settings", [{}, V4], ids=["plain", "deepseek-v4"])
@pytest.mark.parametrize("effort", ["none", "high"])
async def test_parsed_answers_are_of_the_type_that_was_asked_for(front, settings, effort):
    if effort == "high" and not settings:
        pytest.skip("the plain format does not reason")
    async with serving(front, **settings) as url, openai_client(url) as client:
        for seed in range(3):
            answer = await client.chat.completions.parse(
                model=MODEL, messages=ASK, response_format=Forecast, reasoning_effort=effort, seed=seed
            )
            assert isinstance(answer.choices[0].message.parsed, Forecast)
        answer = await client.responses.parse(
            model=MODEL, input="How is Bern?", text_format=Forecast, reasoning={"effort": effort}
        )
        assert isinstance(answer.output_parsed, Forecast) and answer.text.format.type == "json_schema"


async def test_any_json_object_is_one(front):
    async with serving(front) as url, openai_client(url) as client:
        for seed in range(3):
            answer = await client.chat.completions.create(
                model=MODEL, messages=ASK, response_format={"type": "json_object"}, seed=seed, max_tokens=2000
            )
            assert isinstance(json.loads(answer.choices[0].message.content), dict)
        answer = await client.completions.create(
            model=MODEL, prompt="x", max_tokens=2000, extra_body={"response_format": {"type": "json_object"}}
        )
        assert isinstance(json.loads(answer.choices[0].text), dict)


@pytest.mark.parametrize("effort", ["none", "high"])
@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ("required", {"weather", "clock"}),
        ({"type": "function", "function": {"name": "clock"}}, {"clock"}),
        (
            {
                "type": "allowed_tools",
                "allowed_tools": {
                    "mode": "required",
                    "tools": [{"type": "function", "function": {"name": "weather"}}],
                },
            },
            {"weather"},
        ),
    ],
    ids=["required", "named", "allowed"],
)
async def test_forced_calls_are_made_and_keep_to_their_schemas(front, choice, names, effort):
    seen = set()
    async with serving(front, **V4) as url, openai_client(url) as client:
        for seed in range(4):
            answer = await client.chat.completions.create(
                model=MODEL,
                messages=ASK,
                tools=TOOLS,
                tool_choice=choice,
                seed=seed,
                reasoning_effort=effort,
                parallel_tool_calls=False,
            )
            (call,) = answer.choices[0].message.tool_calls
            jsonschema.validate(json.loads(call.function.arguments), SCHEMAS[call.function.name])
            assert answer.choices[0].finish_reason == "tool_calls" and not answer.choices[0].message.content
            seen.add(call.function.name)
    assert seen <= names


async def test_forced_calls_over_the_responses_api(front):
    async with serving(front, **V4) as url, openai_client(url) as client:
        for choice in ("required", {"type": "function", "name": "clock"}):
            answer = await client.responses.create(
                model=MODEL, input="x", tools=FLAT_TOOLS, tool_choice=choice, reasoning={"effort": "none"}
            )
            calls = [item for item in answer.output if item.type == "function_call"]
            assert calls and len(calls) == len(answer.output)
            for call in calls:
                jsonschema.validate(json.loads(call.arguments), SCHEMAS[call.name])
            assert answer.parallel_tool_calls is True and answer.tool_choice in ("required", answer.tool_choice)


async def test_forced_calls_over_anthropics_api(front):
    async with serving(front, **V4) as url, anthropic_client(url) as client:
        for seed, choice in enumerate(
            [
                {"type": "any"},
                {"type": "tool", "name": "weather"},
                {"type": "any", "disable_parallel_tool_use": True},
            ]
        ):
            answer = await client.messages.create(
                model=MODEL,
                messages=ASK,
                max_tokens=4000,
                tools=THEIR_TOOLS,
                tool_choice=choice,
                extra_body={"seed": seed},
            )
            assert answer.stop_reason == "tool_use"
            assert {block.type for block in answer.content} == {"tool_use"}
            for block in answer.content:
                jsonschema.validate(block.input, SCHEMAS[block.name])
            assert len(answer.content) == 1 or "disable_parallel_tool_use" not in choice
        schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
        answer = await client.messages.create(
            model=MODEL,
            messages=ASK,
            max_tokens=4000,
            extra_body={"output_config": {"format": {"type": "json_schema", "schema": schema}}},
        )
        jsonschema.validate(json.loads(answer.content[0].text), schema)


async def test_strict_tools_keep_to_their_schemas_where_the_model_chooses(front):
    """A random text hardly ever begins a block of calls, so the test checks the grammar itself."""
    tools = [{"type": "function", "function": {**WEATHER, "strict": True}}]
    async with serving(front, **V4) as url, openai_client(url) as client:
        answer = await client.chat.completions.create(
            model=MODEL, messages=ASK, tools=tools, max_tokens=40, reasoning_effort="none"
        )
        assert answer.choices[0].message.content is not None


async def test_the_agents_framework_gets_its_calls_and_its_type(front, workers):
    agents.set_tracing_disabled(True)
    asked = []

    @agents.function_tool
    def weather(days: Literal[1, 2, 3], exact: bool) -> str:
        """The weather."""
        asked.append((days, exact))
        return "sunny"

    async with serving(front, **V4) as url:
        for kind in (agents.OpenAIChatCompletionsModel, agents.OpenAIResponsesModel):
            agent = agents.Agent(
                name="a",
                model=kind(model=MODEL, openai_client=openai_client(url)),
                tools=[weather],
                output_type=Forecast,
                model_settings=agents.ModelSettings(tool_choice="required", parallel_tool_calls=False),
            )
            # The framework lets the model choose again after a call, and its answer must fit the type.
            result = await agents.Runner.run(agent, "How is Bern?", max_turns=30)
            assert isinstance(result.final_output, Forecast)
    assert asked and all(days in (1, 2, 3) and isinstance(exact, bool) for days, exact in asked)


BAD = {"type": "object", "properties": {"a": {"type": "integer", "minimum": 3, "maximum": 2}}, "required": ["a"]}
ODD = {"type": "object", "properties": {"a": {"not": {"type": "string"}}}}
BAD_TOOL = {"type": "function", "function": {"name": "bad", "parameters": BAD}}
ODD_TOOL = {"type": "function", "function": {"name": "odd", "parameters": ODD, "strict": True}}


def schema_format(schema):
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"response_format": schema_format(BAD)}, "response_format"),
        ({"response_format": schema_format(ODD)}, "response_format"),
        ({"response_format": schema_format({"type": "string", "pattern": "(?=a)"})}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"tools": [*TOOLS, BAD_TOOL], "tool_choice": "required"}, "tools[2].function.parameters"),
        ({"tools": [ODD_TOOL]}, "tools[0].function.parameters"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "no"}}}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": "sometimes"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function"}}, "tool_choice"),
    ],
    ids=lambda value: json.dumps(value)[:30],
)
async def test_what_cannot_be_enforced_is_refused_by_name_and_costs_nothing(front, tmp_path, changes, param):
    async with serving(front, **V4) as url, openai_client(url) as client:
        with pytest.raises(openai.BadRequestError) as caught:
            await client.chat.completions.create(model=MODEL, messages=ASK, **changes)
        assert (caught.value.param, caught.value.type) == (param, "invalid_request_error")
    assert records(tmp_path) == []


async def test_other_apis_name_their_own_fields(front):
    async with serving(front, **V4) as url:
        async with openai_client(url) as client:
            for changes, param in [
                ({"text": {"format": {"type": "json_schema", "name": "x", "schema": BAD}}}, "text.format.schema"),
                ({"tools": [{**FLAT_TOOLS[0], "parameters": BAD}], "tool_choice": "required"}, "tools[0].parameters"),
            ]:
                with pytest.raises(openai.BadRequestError) as caught:
                    await client.responses.create(model=MODEL, input="x", **changes)
                assert caught.value.param == param
        async with anthropic_client(url) as client:
            for changes, param in [
                ({"tools": [{"name": "t", "input_schema": BAD}], "tool_choice": {"type": "any"}}, "tools[0].input"),
                ({"tools": THEIR_TOOLS, "tool_choice": {"type": "tool", "name": "no"}}, "tool_choice"),
                ({"tool_choice": {"type": "any"}}, "tool_choice"),
            ]:
                with pytest.raises(anthropic.BadRequestError, match=param.replace("[", r"\[")):
                    await client.messages.create(model=MODEL, messages=ASK, max_tokens=9, extra_body=changes)


async def test_several_outputs_share_one_prompt_and_are_told_apart(front, tmp_path):
    asking = {"model": MODEL, "messages": ASK, "n": 3, "max_tokens": 12, "seed": 5}
    asking["extra_body"] = {"min_tokens": 4}
    async with serving(front) as url, openai_client(url) as client:
        whole = await client.chat.completions.create(**asking, logprobs=True)
        streamed, usage = {}, None
        async for chunk in await client.chat.completions.create(
            **asking, stream=True, stream_options={"include_usage": True}
        ):
            usage = chunk.usage or usage
            for choice in chunk.choices:
                streamed.setdefault(choice.index, []).append(choice)
        single = [await client.chat.completions.create(**{**asking, "n": 1, "seed": seed}) for seed in (5, 6, 7)]
    texts = [choice.message.content for choice in whole.choices]
    assert [choice.index for choice in whole.choices] == [0, 1, 2] and len(set(texts)) == 3
    # Seeds are as in vLLM: each output equals that of a single request with the next seed.
    assert texts == [each.choices[0].message.content for each in single]
    assert all(len(choice.logprobs.content) > 0 for choice in whole.choices)
    for index, choices in streamed.items():
        assert "".join(choice.delta.content or "" for choice in choices) == texts[index]
        assert choices[0].delta.role == "assistant" and choices[-1].finish_reason in ("stop", "length")
    assert whole.usage.prompt_tokens == single[0].usage.prompt_tokens == usage.prompt_tokens
    assert whole.usage.completion_tokens == usage.completion_tokens == sum(e.usage.completion_tokens for e in single)
    assert len(records(tmp_path)) == 5


async def test_the_best_of_several_are_shown_and_all_are_counted(front):
    asking = {"model": MODEL, "prompt": "x", "max_tokens": 6, "seed": 1, "temperature": 1.0}
    async with serving(front) as url, openai_client(url) as client:
        every = await client.completions.create(**asking, n=4)
        best = await client.completions.create(**asking, n=2, best_of=4)
        streamed = {}
        async for chunk in await client.completions.create(**asking, n=2, best_of=4, stream=True):
            for choice in chunk.choices:
                streamed[choice.index] = streamed.get(choice.index, "") + choice.text
    # These workers report minus the token's id as its log probability.
    ranked = sorted((choice.text for choice in every.choices), key=lambda text: sum(text.encode()))
    assert [choice.text for choice in best.choices] == ranked[:2] == [streamed[0], streamed[1]]
    assert best.usage == every.usage and best.choices[0].logprobs is None


async def test_forced_calls_of_several_outputs_are_each_one(front):
    async with serving(front, **V4) as url, openai_client(url) as client:
        answer = await client.chat.completions.create(
            model=MODEL, messages=ASK, tools=TOOLS, tool_choice="required", n=2, reasoning_effort="none"
        )
    assert len(answer.choices) == 2 and all(choice.message.tool_calls for choice in answer.choices)
    for choice in answer.choices:
        for call in choice.message.tool_calls:
            jsonschema.validate(json.loads(call.function.arguments), SCHEMAS[call.function.name])


KNOBS = {
    "top_k": 7,
    "min_p": 0.125,
    "repetition_penalty": 1.25,
    "stop_token_ids": [3, 4],
    "ignore_eos": True,
    "min_tokens": 2,
    "presence_penalty": 0.5,
    "frequency_penalty": -0.5,
    "logit_bias": {"65": 300, "66": -1},
}


async def test_every_setting_reaches_the_sampler_from_every_api(front, workers):
    async with serving(front) as url:
        async with openai_client(url) as client:
            await client.chat.completions.create(model=MODEL, messages=ASK, max_tokens=4, extra_body=KNOBS)
            await client.completions.create(model=MODEL, prompt="x", max_tokens=4, extra_body=KNOBS)
            await client.responses.create(model=MODEL, input="x", max_output_tokens=4, extra_body=KNOBS)
        async with anthropic_client(url) as client:
            await client.messages.create(model=MODEL, messages=ASK, max_tokens=4, extra_body=KNOBS)
    assert len(workers.generations) == 4
    for generation in workers.generations:
        sampling = generation.request.sampling
        assert (sampling.top_k, sampling.min_p, sampling.repetition_penalty) == (7, 0.125, 1.25)
        assert (sampling.stop_token_ids, sampling.ignore_eos, sampling.min_tokens) == ((3, 4), True, 2)
        assert (sampling.presence_penalty, sampling.frequency_penalty) == (0.5, -0.5)
        assert sampling.logit_bias == ((65, 100.0), (66, -1.0)) and sampling.max_tokens == 4


async def test_a_stop_text_does_not_count_before_min_tokens(tmp_path):
    async with (
        serving(make_front(Script(say=lambda prompt: "abXcdXef"), ledger=None)) as url,
        openai_client(url) as client,
    ):
        for min_tokens, expected in [(0, "ab"), (2, "ab"), (3, "abXcd"), (6, "abXcdXef")]:
            answer = await client.completions.create(
                model=MODEL, prompt="x", max_tokens=20, stop="X", extra_body={"min_tokens": min_tokens}
            )
            assert answer.choices[0].text == expected


async def test_a_retry_is_given_several_outputs_again_and_they_are_billed_once(front, workers, tmp_path):
    asking = {"model": MODEL, "messages": ASK, "n": 3, "max_tokens": 12, "extra_body": {"min_tokens": 4}}
    async with serving(front) as url, openai_client(url) as client:
        first, again = [
            await client.chat.completions.create(**asking, extra_headers={"Idempotency-Key": "k"}) for _ in range(2)
        ]
    assert [choice.message.content for choice in again.choices] == [choice.message.content for choice in first.choices]
    assert len(workers.generations) == 1 and len(records(tmp_path)) == 1


@pytest.mark.parametrize("stream", [False, True])
async def test_a_stop_text_ends_one_of_several_outputs_alone(tmp_path, stream):
    """The first output does not have the stop text. The second ends in its number, which is the stop text."""
    front = make_front(Script(say=lambda prompt: "abc"), ledger=tmp_path / "ledger")
    asking = {"model": MODEL, "prompt": "x", "max_tokens": 20, "n": 3, "stop": "1"}
    texts, reasons = ["", "", ""], [None] * 3
    async with serving(front) as url, openai_client(url) as client:
        if stream:
            async for chunk in await client.completions.create(**asking, stream=True):
                for choice in chunk.choices:
                    texts[choice.index] += choice.text
                    reasons[choice.index] = choice.finish_reason or reasons[choice.index]
        else:
            answer = await client.completions.create(**asking)
            texts = [choice.text for choice in answer.choices]
            reasons = [choice.finish_reason for choice in answer.choices]
    assert (texts, reasons) == (["abc", "abc", "abc2"], ["stop"] * 3)
    (record,) = records(tmp_path)
    assert record.output_tokens == 3 + 4 + 4
