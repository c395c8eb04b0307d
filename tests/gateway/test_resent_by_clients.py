"""Real clients change an answer before they send it back: they drop its reasoning, rewrite its calls, and send pictures
as JSON. The next prompt still continues from the answer's own tokens, and has no picture's data."""

import json
import time

import httpx2
import pytest

from antefix_router.chat.answer_memory import AnswerMemory, prefix_state
from antefix_router.chat.messages import ChatRole, Message
from antefix_router.gateway.written_media import without_media
from tests.gateway.scripted import Script, make_front, serving
from tests.waiting import AT_MOST_S

MODEL = "antefix-tiny"
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}, "days": {}, "more": {}}}
# Clients rewrite these arguments: a number with a point, unsorted keys, and an accent that some clients escape.
CALL = (
    '\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="weather">\n'
    '<｜DSML｜parameter name="days" string="false">2.0</｜DSML｜parameter>\n'
    '<｜DSML｜parameter name="city" string="true">Z\u00fcrich/Nord</｜DSML｜parameter>\n'
    '<｜DSML｜parameter name="more" string="false">{"b":[1,2],"a":null}</｜DSML｜parameter>\n'
    "</｜DSML｜invoke>\n</｜DSML｜tool_calls>"
)
PNG = "iVBORw0KGgo" + "Ab3/" * 20


class Talk:
    """Two chat requests. The second has the first one's answer as the client changed it."""

    def __init__(self, client, script):
        self._client, self._script = client, script

    async def chat(self, *messages, thinking="high", **more):
        tool = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}
        body = {"model": MODEL, "messages": messages, "tools": [tool], "reasoning_effort": thinking, **more}
        answer = await self._client.post("/v1/chat/completions", json=body)
        assert answer.status_code == 200, answer.text
        self.headers = answer.headers
        return answer.json()["choices"][0]["message"]

    async def again(self, said, **more):
        (call,) = said["tool_calls"]
        asked = {"role": "user", "content": "How is it?"}
        return await self.chat(asked, said, {"role": "tool", "tool_call_id": call["id"], "content": "dry"}, **more)

    def goes_on(self):
        """Whether the last prompt begins with the previous prompt and its answer, token for token."""
        so_far = self._script.prompts[-2] + self._script.generations[-2].samples[0].emitted
        return self._script.prompts[-1][: len(so_far)] == so_far

    @property
    def prompt(self):
        return bytes(token for token in self._script.prompts[-1] if token < 256).decode()


@pytest.fixture
async def talk():
    script = Script(
        say=lambda prompt: ("I look it up.</think>" if prompt.endswith("<think>") else "") + "A moment." + CALL
    )
    async with (
        serving(make_front(script, ledger=None), chat_format="deepseek-v4") as url,
        httpx2.AsyncClient(base_url=url, timeout=AT_MOST_S) as client,
    ):
        yield Talk(client, script)


def without_reasoning(said):
    return {name: value for name, value in said.items() if name not in ("reasoning_content", "refusal")}


async def test_reasoning_that_a_client_drops_is_put_back(talk):
    said = await talk.chat({"role": "user", "content": "How is it?"})
    assert said["reasoning_content"] == "I look it up."
    await talk.again(without_reasoning(said))
    assert talk.goes_on() and talk.headers["antefix-restored-thinking"] == "1"
    await talk.again(said)
    assert "antefix-restored-thinking" not in talk.headers


@pytest.mark.parametrize(
    "rewrite",
    [
        lambda value: json.dumps(value, separators=(",", ":"), ensure_ascii=False),
        lambda value: json.dumps(value, sort_keys=True),
        lambda value: json.dumps({**value, "days": 2}, indent=2),
        lambda value: json.dumps(value).replace("/", "\\/"),
    ],
    ids=["compact", "sorted and escaped", "a whole number", "escaped slashes"],
)
@pytest.mark.parametrize("keeps_reasoning", [True, False])
async def test_a_call_that_a_client_writes_anew_is_the_same_call(talk, rewrite, keeps_reasoning):
    said = await talk.chat({"role": "user", "content": "How is it?"})
    function = said["tool_calls"][0]["function"]
    function["arguments"] = rewrite(json.loads(function["arguments"]))
    await talk.again(said if keeps_reasoning else without_reasoning(said))
    assert talk.goes_on()


async def test_another_call_is_another_answer(talk):
    said = await talk.chat({"role": "user", "content": "How is it?"})
    function = said["tool_calls"][0]["function"]
    function["arguments"] = json.dumps({**json.loads(function["arguments"]), "days": 3})
    await talk.again(without_reasoning(said))
    assert not talk.goes_on() and "antefix-restored-thinking" not in talk.headers
    assert '"days" string="false">3<' in talk.prompt


async def test_nothing_is_put_back_for_another_user_or_where_nothing_was_thought(talk):
    said = await talk.chat({"role": "user", "content": "How is it?"}, user="ann")
    await talk.again(without_reasoning(said), user="bob")
    assert "antefix-restored-thinking" not in talk.headers and "I look it up." not in talk.prompt
    said = await talk.chat({"role": "user", "content": "How is it?"}, thinking="none")
    await talk.again(without_reasoning(said), thinking="none")
    assert talk.goes_on() and "antefix-restored-thinking" not in talk.headers


def test_an_answer_without_reasoning_is_itself_before_it_is_one_with():
    memory = AnswerMemory(num_tokens_max=1000)

    def said(reasoning):
        return Message(role=ChatRole.ASSISTANT, content="yes", reasoning=reasoning)

    def found(reasoning):
        return memory.get(prefix_state("", [7]), said(reasoning))

    memory.put([7], said(""), [1], tenant="")
    memory.put([7], said("why"), [2], tenant="")
    assert found("").tokens == [1] and not found("").is_restored and found("why").tokens == [2]
    # The oldest answers are dropped together with their names, so that nothing remains of them.
    for number in range(100):
        memory.put([number, 0], said("so"), [3], tenant="")
    assert found("") is None and found("why") is None
    assert len(memory._answers) == 1000 // (1 + 2 * 64) == len(memory._said)


RESULTS = [
    json.dumps([{"type": "file", "mediaType": "image/png", "data": {"type": "data", "data": PNG}}]),
    json.dumps([{"type": "text", "text": "a"}, {"type": "image", "data": PNG, "mimeType": "image/png"}], indent=1),
    json.dumps({"content": [{"type": "image_url", "image_url": {"url": f"data:image/webp;base64,{PNG[11:]}"}}]}),
    json.dumps({"shot": PNG}).replace("/", "\\/"),
    json.dumps([{"text": json.dumps({"shot": PNG})}]),
]


@pytest.mark.parametrize("result", RESULTS, ids=range(len(RESULTS)))
async def test_a_picture_that_a_tool_gives_as_json_is_a_placeholder(talk, result):
    said = await talk.chat({"role": "user", "content": "How is it?"})
    tool = {"role": "tool", "tool_call_id": said["tool_calls"][0]["id"], "content": result}
    await talk.chat({"role": "user", "content": "How is it?"}, said, tool)
    assert talk.headers["antefix-left-out"] == "messages[2].content (image)"
    shown = talk.prompt.partition("<tool_result>")[2].partition("</tool_result>")[0]
    assert "[image: not shown, this model reads text only]" in shown and PNG[12:40] not in shown
    json.loads(shown)


@pytest.mark.parametrize(
    "text",
    [
        f"![a](data:image/png;base64,{PNG})",
        json.dumps({"magic": "iVBORw0KGgo", "why": "how a PNG begins"}),
        json.dumps({"note": f"it is {PNG}"}),
        json.dumps({"key": "R0lG" + "x" * 30}),
        "[not JSON",
        "",
    ],
)
def test_other_text_stays_as_it_is(text):
    assert without_media(text) == (text, [])


def test_looking_for_pictures_is_linear():
    start = time.process_time()
    for piece in ("\\", '"', '"/9j/', '"data:image/png;', "\\/", '"/9j/' + "\\"):
        without_media("[" + piece * (1_000_000 // len(piece)))
    assert time.process_time() - start < 60.0


PICTURE = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PNG}"}}


async def test_a_picture_behind_a_tools_result_is_the_tools_whatever_stands_between(talk):
    said = await talk.chat({"role": "user", "content": "How is it?"})
    await talk.chat(
        {"role": "user", "content": "How is it?"},
        said,
        {"role": "tool", "tool_call_id": said["tool_calls"][0]["id"], "content": "See file 1."},
        {"role": "system", "content": "Files follow."},
        {"role": "user", "content": [{"type": "text", "text": "File 1:"}, PICTURE]},
    )
    assert talk.headers["antefix-left-out"] == "messages[4].content[1] (image)"


async def test_a_picture_to_be_answered_is_refused_also_before_system_text(talk):
    body = {"model": MODEL, "messages": [{"role": "user", "content": [PICTURE]}, {"role": "system", "content": "b"}]}
    answer = await talk._client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "messages[0].content[0]"


async def test_a_breakpoint_on_a_call_lies_behind_the_answer(talk):
    said = await talk.chat({"role": "user", "content": "How is it?"})
    said["tool_calls"][0]["cache_control"] = {"type": "ephemeral"}
    await talk.again(without_reasoning(said))
    assert "antefix-ignored" not in talk.headers and talk.goes_on()
    ((num_tokens, _),) = talk._script.requests[-1].breakpoints
    assert num_tokens == len(talk._script.prompts[-2] + talk._script.generations[-2].samples[0].emitted)


def tools_of(*names, **more):
    return [{"name": name, "description": f"about {name}", "input_schema": SCHEMA, **more} for name in names]


def found(*names):
    call = {"type": "tool_use", "id": "1", "name": "ToolSearch", "input": {}}
    parts = [{"type": "tool_reference", "tool_name": name} for name in names]
    result = {"type": "tool_result", "tool_use_id": "1", "content": parts}
    return [{"role": "assistant", "content": [call]}, {"role": "user", "content": [result]}]


async def test_a_deferred_tool_is_shown_where_it_was_found(talk):
    async def ask(messages, tools):
        body = {"model": MODEL, "max_tokens": 4096, "messages": [*ASKED, *messages], "tools": tools}
        answer = await talk._client.post("/v1/messages", json=body)
        assert answer.status_code == 200, answer.text
        return answer

    at_first, search = tools_of("Bash", "Write"), tools_of("ToolSearch")
    await ask([], [*at_first, *search])
    head = talk.prompt.removesuffix("<｜Assistant｜></think>")
    # Clients put a found tool into the middle of the list. It may also have been there from the beginning.
    deferred = tools_of("Notebook", defer_loading=True)
    await ask([], [*at_first[:1], *deferred, *at_first[1:], *search])
    assert talk.prompt.startswith(head) and "about Notebook" not in talk.prompt
    answer = await ask(found("Notebook", "Nothing"), [*at_first[:1], *deferred, *at_first[1:], *search])
    assert talk.prompt.startswith(head) and "antefix-ignored" not in answer.headers
    result = talk.prompt.partition("<tool_result>")[2].partition("</tool_result>")[0]
    shown, nothing, _ = result.removeprefix("[tool: Notebook]\n").partition("[tool: Nothing]")
    assert json.loads(shown)["description"] == "about Notebook" and nothing
    # A client without a search tool gets all tools in its prompt.
    answer = await ask([], [*at_first, *deferred])
    assert "about Notebook" in talk.prompt and answer.headers["antefix-ignored"] == "tools[2].defer_loading"


ASKED = [{"role": "user", "content": "How is it?"}]
