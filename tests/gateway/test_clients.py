"""The real `openai` and `anthropic` packages, and an agent framework, against the gateway with scripted workers."""

import asyncio
import hashlib
import json
import socket

import pytest

from antefix.errors import Overloaded, Unavailable
from antefix_billing.ledger_files import read_settled
from antefix_billing.limits import Limit, LimitWindow, TenantLimits
from antefix_billing.tenants import TenantBook
from antefix_billing.usage_record import Status
from antefix_router.gateway.app import start_http
from antefix_router.gateway.gateway_config import GatewayConfig
from tests.gateway.scripted import Script, make_front, serving
from tests.on_demand import agents, anthropic, openai
from tests.waiting import AT_MOST_S, until

pytestmark = pytest.mark.slow

httpx2 = pytest.importorskip("httpx2")

CALL = (
    '\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="weather">\n'
    '<｜DSML｜parameter name="city" string="true">Bern</｜DSML｜parameter>\n</｜DSML｜invoke>\n</｜DSML｜tool_calls>'
)
WEATHER = {
    "name": "weather",
    "description": "The weather.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
ASK = [{"role": "user", "content": "How is Bern?"}]
MODEL = "antefix-tiny"


def agent_script():
    """Thinks, calls the tool, and answers when the result is there."""
    script = Script(hit=64)
    script.say = lambda prompt: (
        "It is.</think>Sunny in Bern." if "<tool_result>" in prompt else "I should look.</think>One moment." + CALL
    )
    return script


@pytest.fixture
def ledger(tmp_path):
    return tmp_path / "ledger"


@pytest.fixture
def serve(ledger):
    def serve(script, *, tenants=None, **settings):
        return serving(make_front(script, ledger=ledger, tenants=tenants), **settings)

    return serve


_clients = []


@pytest.fixture(autouse=True)
async def close_clients():
    yield
    while _clients:
        await _clients.pop().close()


def openai_client(url, key="none"):
    _clients.append(openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0))
    return _clients[-1]


def anthropic_client(url, key="none"):
    _clients.append(anthropic.AsyncAnthropic(base_url=url, api_key=key, max_retries=0))
    return _clients[-1]


def records(ledger):
    return [item.record for item in read_settled(ledger)]


async def test_openai_chat_with_reasoning_and_tools(serve, ledger):
    script = agent_script()
    async with serve(script, chat_format="deepseek-v4") as url:
        client = openai_client(url)
        tools = [{"type": "function", "function": WEATHER}]
        messages = list(ASK)
        first = await client.chat.completions.create(model=MODEL, messages=messages, tools=tools)
        choice = first.choices[0]
        assert choice.finish_reason == "tool_calls" and choice.message.content == "One moment."
        assert choice.message.reasoning_content == "I should look."
        (call,) = choice.message.tool_calls
        assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"city": "Bern"})
        messages += [
            choice.message.model_dump(exclude_none=True),
            {"role": "tool", "tool_call_id": call.id, "content": "sunny"},
        ]
        second = await client.chat.completions.create(model=MODEL, messages=messages, tools=tools)
        assert second.choices[0].message.content == "Sunny in Bern."
        assert second.choices[0].finish_reason == "stop"
    # The second prompt begins with the first prompt and its answer, token for token, so it hits them.
    so_far = script.prompts[0] + list(agent_script().say("").encode())
    assert script.prompts[1][: len(so_far)] == so_far
    usage, record = first.usage, records(ledger)[0]
    assert usage.prompt_tokens == record.prompt_tokens == usage.prompt_cache_hit_tokens + usage.prompt_cache_miss_tokens
    assert usage.prompt_tokens_details.cached_tokens == 64 == record.cache_hit_tokens
    assert usage.completion_tokens_details.reasoning_tokens == record.reasoning_tokens == len("I should look.</think>")


async def test_openai_chat_streams_the_same_answer(serve):
    async with serve(agent_script(), chat_format="deepseek-v4") as url:
        stream = await openai_client(url).chat.completions.create(
            model=MODEL,
            messages=ASK,
            tools=[{"type": "function", "function": WEATHER}],
            stream=True,
            stream_options={"include_usage": True},
        )
        content = reasoning = arguments = ""
        finish, usage = None, None
        async for chunk in stream:
            usage = chunk.usage or usage
            for choice in chunk.choices:
                content += choice.delta.content or ""
                reasoning += getattr(choice.delta, "reasoning_content", None) or ""
                arguments += "".join(call.function.arguments for call in choice.delta.tool_calls or [])
                finish = choice.finish_reason or finish
    assert (content, reasoning, json.loads(arguments)) == ("One moment.", "I should look.", {"city": "Bern"})
    assert finish == "tool_calls" and usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


@pytest.mark.services
async def test_openai_responses_with_tools(serve):
    script = agent_script()
    async with serve(script, chat_format="deepseek-v4") as url:
        client = openai_client(url)
        tools = [{"type": "function", "strict": True, **WEATHER}]
        items = [{"role": "user", "content": "How is Bern?"}]
        first = await client.responses.create(
            model=MODEL, input=items, tools=tools, instructions="Be brief.", store=False
        )
        kinds = [item.type for item in first.output]
        assert kinds == ["reasoning", "message", "function_call"] and first.output_text == "One moment."
        call = first.output[-1]
        items += [item.model_dump(exclude_none=True) for item in first.output]
        items += [{"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}]
        second = await client.responses.create(model=MODEL, input=items, tools=tools, instructions="Be brief.")
        assert second.output_text == "Sunny in Bern." and second.status == "completed"
        assert second.usage.input_tokens_details.cached_tokens == 64
    so_far = script.prompts[0] + list(agent_script().say("").encode())
    assert script.prompts[1][: len(so_far)] == so_far


async def test_openai_responses_stream(serve):
    async with (
        serve(agent_script(), chat_format="deepseek-v4") as url,
        openai_client(url).responses.stream(
            model=MODEL, input="How is Bern?", tools=[{"type": "function", "strict": False, **WEATHER}]
        ) as stream,
    ):
        kinds = [event.type async for event in stream]
        final = await stream.get_final_response()
    assert kinds[0] == "response.created" and kinds[-1] == "response.completed"
    assert final.output[-1].name == "weather" and final.output_text == "One moment."


async def test_anthropic_messages_with_thinking_and_tools(serve):
    script = agent_script()
    async with serve(script, chat_format="deepseek-v4") as url:
        client = anthropic_client(url)
        tools = [{"name": "weather", "description": "The weather.", "input_schema": WEATHER["parameters"]}]
        settings = {
            "model": MODEL,
            "max_tokens": 500,
            "tools": tools,
            "system": [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral", "ttl": "1h"}}],
            "thinking": {"type": "enabled", "budget_tokens": 1024},
        }
        messages = list(ASK)
        first = await client.messages.create(messages=messages, **settings)
        assert first.stop_reason == "tool_use"
        assert [block.type for block in first.content] == ["thinking", "text", "tool_use"]
        assert first.content[2].input == {"city": "Bern"}
        usage = first.usage
        total = usage.input_tokens + usage.cache_creation_input_tokens + usage.cache_read_input_tokens
        assert total == len(script.prompts[0]) and usage.cache_read_input_tokens == 64
        messages += [
            {"role": "assistant", "content": [block.model_dump() for block in first.content]},
            {
                "role": "user",
                "content": [{"type": "tool_result", "tool_use_id": first.content[2].id, "content": "sunny"}],
            },
        ]
        async with client.messages.stream(messages=messages, **settings) as stream:
            kinds = [event.type async for event in stream]
            second = await stream.get_final_message()
        assert kinds[0] == "message_start" and kinds[-1] == "message_stop"
        assert [block.type for block in second.content] == ["thinking", "text"]
        assert second.content[1].text == "Sunny in Bern." and second.stop_reason == "end_turn"
        counted = await client.messages.count_tokens(
            model=MODEL, messages=messages, tools=tools, system=settings["system"], thinking=settings["thinking"]
        )
        assert counted.input_tokens == len(script.prompts[1])
    so_far = script.prompts[0] + list(agent_script().say("").encode())
    assert script.prompts[1][: len(so_far)] == so_far
    assert script.requests[0].breakpoints[0][1] == 3600.0


async def test_anthropic_says_which_stop_sequence_it_was(serve, ledger):
    script = Script(say=lambda prompt: "one two three")
    async with serve(script) as url:
        message = await anthropic_client(url).messages.create(
            model=MODEL, max_tokens=50, messages=ASK, stop_sequences=["zzz", " tw"]
        )
    assert (message.content[0].text, message.stop_reason, message.stop_sequence) == ("one", "stop_sequence", " tw")
    assert records(ledger)[0].status is Status.STOP


async def test_openai_completions_take_text_and_tokens(serve):
    script = Script(say=lambda prompt: "abc")
    async with serve(script) as url:
        client = openai_client(url)
        by_text = await client.completions.create(model=MODEL, prompt="<|user|>x", echo=True)
        by_tokens = await client.completions.create(model=MODEL, prompt=[258, 120], stop=["c"])
        assert script.prompts == [[258, 120], [258, 120]]
        assert (by_text.choices[0].text, by_tokens.choices[0].text) == ("<|user|>xabc", "ab")
        chunks = [c async for c in await client.completions.create(model=MODEL, prompt="x", max_tokens=2, stream=True)]
        assert "".join(c.choices[0].text for c in chunks) == "ab" and chunks[-1].choices[0].finish_reason == "length"


@pytest.mark.slow
@pytest.mark.services
async def test_the_agents_framework_runs_its_tools(serve):
    agents.set_tracing_disabled(True)
    asked = []

    @agents.function_tool
    def weather(city: str) -> str:
        """The weather."""
        asked.append(city)
        return "sunny"

    async with serve(agent_script(), chat_format="deepseek-v4") as url:
        for kind in (agents.OpenAIChatCompletionsModel, agents.OpenAIResponsesModel):
            model = kind(model=MODEL, openai_client=openai_client(url))
            agent = agents.Agent(name="a", instructions="Be brief.", model=model, tools=[weather])
            result = await agents.Runner.run(agent, "How is Bern?")
            assert result.final_output == "Sunny in Bern."
    assert asked == ["Bern", "Bern"]


UNSUPPORTED = [
    {"n": 17},
    {"n": 2, "temperature": 0},
    {"top_logprobs": 2},
    {"logprobs": True, "top_logprobs": 21},
    {"frequency_penalty": 2.5},
    {"logit_bias": {"300": 2}},
    {"response_format": {"type": "xml"}},
    {"tool_choice": "required"},
    {"extra_body": {"min_p": 1.1}},
    {"temperature": 11},
    {"top_p": 0},
    {"max_tokens": 0},
    {"tools": [{"type": "function", "function": WEATHER}]},
    {"messages": []},
    {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
    {"messages": [{"role": "assistant", "content": "a"}]},
]


@pytest.mark.parametrize("changes", UNSUPPORTED, ids=lambda changes: json.dumps(changes)[:40])
async def test_what_the_model_cannot_do_is_refused_by_name(serve, ledger, changes):
    async with serve(Script()) as url:
        with pytest.raises(openai.BadRequestError) as caught:
            await openai_client(url).chat.completions.create(**({"model": MODEL, "messages": ASK} | changes))
    assert caught.value.body["type"] == "invalid_request_error" and caught.value.body["message"]
    assert records(ledger) == []


HUGE = 1 << 40
NAMED = [
    ({"temperature": "hot"}, "temperature", "invalid_type"),
    ({"max_tokens": "5"}, "max_tokens", "invalid_type"),
    ({"n": 17}, "n", "unsupported_value"),
    ({"n": True}, "n", "invalid_type"),
    ({"n": 2, "temperature": 0}, "n", "invalid_value"),
    ({"extra_body": {"n": 2, "best_of": 1}}, "best_of", "unsupported_value"),
    ({"extra_body": {"min_p": -0.1}}, "min_p", "invalid_value"),
    ({"extra_body": {"top_k": "many"}}, "top_k", "invalid_type"),
    ({"extra_body": {"repetition_penalty": 0}}, "repetition_penalty", "invalid_value"),
    ({"extra_body": {"min_tokens": 9}, "max_tokens": 8}, "min_tokens", "invalid_value"),
    ({"extra_body": {"stop_token_ids": ["a"]}}, "stop_token_ids", "invalid_type"),
    ({"presence_penalty": -2.1}, "presence_penalty", "invalid_value"),
    ({"logit_bias": {"x": 1}}, "logit_bias", "invalid_type"),
    ({"logit_bias": {"264": 1}}, "logit_bias", "invalid_value"),
    ({"response_format": {"type": "xml"}}, "response_format", "unsupported_value"),
    ({"tool_choice": "required"}, "tool_choice", "invalid_value"),
    ({"messages": []}, "messages", "invalid_value"),
    ({"messages": [{"content": "x"}]}, "messages[0].role", "missing_required_parameter"),
    ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role", "unsupported_value"),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "missing_required_parameter"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "invalid_type"),
    ({"top_logprobs": 2}, "top_logprobs", "unsupported_value"),
    ({"max_tokens": HUGE}, None, "context_length_exceeded"),
]


@pytest.mark.parametrize(("changes", "param", "code"), NAMED, ids=lambda value: json.dumps(value)[:30])
async def test_errors_name_the_field_and_say_what_is_wrong_with_it(serve, changes, param, code):
    async with serve(Script()) as url:
        with pytest.raises(openai.BadRequestError) as caught:
            await openai_client(url).chat.completions.create(**({"model": MODEL, "messages": ASK} | changes))
    assert (caught.value.param, caught.value.code, caught.value.type) == (param, code, "invalid_request_error")


async def test_other_errors_have_the_codes_that_clients_know(serve):
    async with serve(Script(), unknown_models="refuse") as url:
        with pytest.raises(openai.NotFoundError) as unknown:
            await openai_client(url).chat.completions.create(model="gpt-x", messages=ASK)
        with pytest.raises(anthropic.BadRequestError, match="prompt is too long"):
            await anthropic_client(url).messages.create(model=MODEL, messages=ASK, max_tokens=HUGE, timeout=AT_MOST_S)
        async with httpx2.AsyncClient(base_url=url, timeout=AT_MOST_S) as plain:
            unlimited = await plain.post("/v1/messages", json={"model": MODEL, "messages": ASK})
            coded = await plain.post("/v1/completions", content=b"{}", headers={"content-encoding": "gzip"})
    assert unknown.value.code == "model_not_found"
    assert unlimited.status_code == 400 and "max_tokens" in unlimited.json()["error"]["message"]
    assert coded.status_code == 400 and "gzip" in coded.json()["error"]["message"]


async def test_a_cache_key_names_the_conversation_to_the_router(serve):
    script = Script()
    async with serve(script) as url:
        client = openai_client(url)
        await client.chat.completions.create(model=MODEL, messages=ASK, prompt_cache_key="a")
        await client.responses.create(model=MODEL, input="How is Bern?", prompt_cache_key="b")
        await client.completions.create(model=MODEL, prompt="x", extra_body={"prompt_cache_key": "c"})
        await client.chat.completions.create(model=MODEL, messages=ASK)
        with pytest.raises(openai.BadRequestError, match="session takes 512 bytes"):
            await client.chat.completions.create(model=MODEL, messages=ASK, prompt_cache_key="k" * 513)
    assert [request.caller.session for request in script.requests] == ["a", "b", "c", ""]


async def test_defaults_that_clients_send_are_taken(serve):
    async with serve(Script()) as url:
        answer = await openai_client(url).chat.completions.create(
            model=MODEL,
            messages=[{"role": "developer", "content": "x"}, *ASK],
            n=1,
            frequency_penalty=0,
            presence_penalty=0.0,
            logprobs=False,
            service_tier="auto",
            metadata={"a": "b"},
            prompt_cache_key="k",
            user="u",
            response_format={"type": "text"},
            parallel_tool_calls=True,
            reasoning_effort="none",
        )
    assert answer.choices[0].message.content == "yes"


async def test_errors_have_each_providers_shape(serve):
    async with serve(Script(error=Overloaded("full", retry_after_s=3.0)), unknown_models="refuse") as url:
        with pytest.raises(openai.RateLimitError) as caught:
            await openai_client(url).chat.completions.create(model=MODEL, messages=ASK, stream=True)
        assert caught.value.response.headers["retry-after"] == "3"
        with pytest.raises(anthropic.RateLimitError) as refused:
            await anthropic_client(url).messages.create(model=MODEL, messages=ASK, max_tokens=5)
        assert refused.value.body["error"]["type"] == "rate_limit_error"
        with pytest.raises(openai.NotFoundError):
            await openai_client(url).chat.completions.create(model="other", messages=ASK)
        with pytest.raises(anthropic.NotFoundError):
            await anthropic_client(url).messages.create(model="other", messages=ASK, max_tokens=5)
        with pytest.raises(anthropic.BadRequestError) as bad:
            await anthropic_client(url).messages.create(
                model=MODEL, messages=ASK, max_tokens=5, extra_body={"top_k": -4}
            )
        assert bad.value.body["type"] == "error"
        with pytest.raises(openai.NotFoundError):
            await openai_client(url).embeddings.create(model=MODEL, input="x")


async def test_a_failure_in_mid_stream_reaches_the_client_as_an_error(serve, ledger):
    async with serve(Script(say=lambda p: "abcdef", error=Unavailable("gone"), fail_after=3)) as url:
        text = ""
        with pytest.raises(openai.APIError, match="gone"):
            async for chunk in await openai_client(url).chat.completions.create(model=MODEL, messages=ASK, stream=True):
                text += chunk.choices[0].delta.content or ""
    assert text == "abc"
    (record,) = records(ledger)
    assert (record.status, record.output_tokens, record.price, record.detail) == (Status.FAILED, 3, 0, "Unavailable")


@pytest.mark.services
async def test_a_call_that_breaks_its_strict_schema_is_never_handed_out(serve):
    number = {"type": "object", "properties": {"city": {"type": "integer"}}, "required": ["city"]}
    async with serve(agent_script(), chat_format="deepseek-v4") as url:
        for strict, finish in ((True, "stop"), (False, "tool_calls")):
            tools = [{"type": "function", "function": {"name": "weather", "strict": strict, "parameters": number}}]
            answer = await openai_client(url).chat.completions.create(model=MODEL, messages=ASK, tools=tools)
            assert answer.choices[0].finish_reason == finish
            assert bool(answer.choices[0].message.tool_calls) is not strict


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_stops_the_work(serve, ledger, stream):
    script = Script(say=lambda p: "x" * 1000, pause_s=0.01)
    async with serve(script) as url:
        asking = asyncio.create_task(_read_for_a_while(url, stream))
        await until(lambda: script.generations and len(script.generations[0].samples[0].emitted) > 5)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        await until(lambda: records(ledger))
    (record,) = records(ledger)
    assert script.num_cancelled == 1
    # A call is sent only when it is complete, so a cut-off call was not sent.
    assert record.status is Status.CANCELLED and (
        0 < record.output_tokens < 1000 if stream else not record.output_tokens
    )
    assert record.prompt_tokens == len(script.prompts[0])


async def _read_for_a_while(url, stream):
    answer = await openai_client(url).chat.completions.create(model=MODEL, messages=ASK, stream=stream)
    if stream:
        async for _ in answer:
            pass


async def test_a_client_that_leaves_before_the_first_token_stops_the_work_and_pays_nothing(serve, ledger):
    script = Script(hold=asyncio.Event())
    async with serve(script) as url:
        asking = asyncio.create_task(_read_for_a_while(url, True))
        await until(lambda: script.requests)
        asking.cancel()
        await until(lambda: records(ledger))
    (record,) = records(ledger)
    assert (record.status, record.prompt_tokens, record.output_tokens) == (Status.CANCELLED, 0, 0)


@pytest.mark.slow
async def test_a_slow_client_does_not_stop_others(serve):
    """A client reads nothing of an answer that is larger than all buffers. Only that client's own output waits."""
    num_tokens = 30_000
    script = Script(say=lambda prompt: "x" * (num_tokens if "long" in prompt else 20))
    async with serve(script) as url:
        host, _, port = url.removeprefix("http://").rpartition(":")
        slow = socket.socket()
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(slow, (host, int(port)))
        ask = {"model": MODEL, "prompt": "a long one", "stream": True, "max_tokens": num_tokens}
        body = json.dumps(ask).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        await loop.sock_sendall(slow, f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        await until(lambda: script.generations and script.generations[0].num_emitted)
        client = openai_client(url)
        async with asyncio.timeout(AT_MOST_S):
            for _ in range(5):
                answer = await client.chat.completions.create(model=MODEL, messages=ASK)
                assert answer.usage.completion_tokens == 20
            # This output waits for its own client until that client reads.
            while (num := script.generations[0].num_emitted) < num_tokens:
                await asyncio.sleep(0.5)
                if script.generations[0].num_emitted == num:
                    break
        assert num < num_tokens
        slow.close()
        await until(lambda: script.num_cancelled)


async def test_answers_are_not_held_back_for_acknowledgements(ledger):
    """Without TCP_NODELAY each answer waits 40 ms between head and body for the client's delayed acknowledgement."""
    front = make_front(Script(), ledger=ledger)
    http = await start_http(front, GatewayConfig(http_address="127.0.0.1:0"))
    try:
        host, _, port = http.address.rpartition(":")
        _, writer = await asyncio.open_connection(host, int(port))
        connections = http._server.server_state.connections
        await until(lambda: connections)
        (connection,) = connections
        accepted = connection.transport.get_extra_info("socket")
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) != 0
        writer.close()
    finally:
        await http.stop()
        await front.accounts.close()


async def test_bodies_and_requests_at_once_are_limited(serve):
    script = Script(hold=asyncio.Event())
    async with serve(script, http_body_bytes_max=2000, http_requests_max=1) as url:
        client = openai_client(url)
        with pytest.raises(openai.APIStatusError) as large:
            await client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "x" * 3000}])
        assert large.value.status_code == 413
        held = asyncio.create_task(client.chat.completions.create(model=MODEL, messages=ASK))
        await until(lambda: script.requests)
        with pytest.raises(openai.RateLimitError, match="running"):
            await client.chat.completions.create(model=MODEL, messages=ASK)
        script.hold.set()
        assert (await held).choices[0].message.content == "yes"


async def test_tenants_have_keys_limits_and_caches_of_their_own(serve, ledger):
    tenants = TenantBook(
        keys={hashlib.sha256(key.encode()).digest(): name for key, name in (("ka", "a"), ("kb", "b"))},
        limits={"a": TenantLimits(limits=(Limit(window=LimitWindow.MONTH, tokens=300),))},
    )
    script = Script()
    async with serve(script, tenants=tenants) as url:
        with pytest.raises(openai.AuthenticationError):
            await openai_client(url, "wrong").chat.completions.create(model=MODEL, messages=ASK)
        with pytest.raises(anthropic.AuthenticationError):
            await anthropic_client(url, "wrong").messages.create(model=MODEL, messages=ASK, max_tokens=5)
        await openai_client(url, "ka").chat.completions.create(model=MODEL, messages=ASK, max_tokens=100)
        with pytest.raises(openai.RateLimitError) as over:
            await openai_client(url, "ka").chat.completions.create(model=MODEL, messages=ASK, max_tokens=300)
        assert (over.value.type, over.value.code) == ("tokens", "rate_limit_exceeded")
        await anthropic_client(url, "kb").messages.create(model=MODEL, messages=ASK, max_tokens=300)
        await openai_client(url, "kb").chat.completions.create(model=MODEL, messages=ASK, user="eve")
    assert [record.tenant for record in records(ledger)] == ["a", "b", "b"]
    assert len({request.cache_tenant for request in script.requests}) == 3


async def test_an_idempotency_key_is_charged_once(serve, ledger):
    script = Script(say=lambda p: "abc")
    async with serve(script) as url:
        client = openai_client(url)
        answers = [
            await client.chat.completions.create(model=MODEL, messages=ASK, extra_headers={"Idempotency-Key": "k1"})
            for _ in range(2)
        ]
        assert answers[0].usage == answers[1].usage and answers[0].id == answers[1].id == "chatcmpl-k1"
        with pytest.raises(openai.BadRequestError, match="another request"):
            await client.chat.completions.create(
                model=MODEL, messages=[{"role": "user", "content": "?"}], extra_headers={"Idempotency-Key": "k1"}
            )
        script.hold = asyncio.Event()
        running = asyncio.create_task(
            client.chat.completions.create(model=MODEL, messages=ASK, extra_headers={"Idempotency-Key": "k2"})
        )
        await until(lambda: len(script.requests) == 2)
        joined = asyncio.create_task(
            client.chat.completions.create(model=MODEL, messages=ASK, extra_headers={"Idempotency-Key": "k2"})
        )
        script.hold.set()
        assert (await running).usage == (await joined).usage
        assert len(script.requests) == 2
    assert [record.request_id for record in records(ledger)] == ["k1", "k2"]
