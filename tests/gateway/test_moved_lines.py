"""Changing lines move behind the stable text.

So other sessions hit text and tools, and later turns hit earlier answers.
"""

import dataclasses
import json
from pathlib import Path

import httpx2
import pytest

from antefix.config import ConfigError
from antefix.tokenizer import load_tokenizer
from antefix_router.chat.answer_memory import AnswerMemory
from antefix_router.chat.deepseek_v4 import DeepSeekV4Format
from antefix_router.chat.messages import ChatRole, Conversation, Effort, Message, TextBreakpoint
from antefix_router.chat.moved_lines import OFF, SHIPPED, load_rules, move_lines
from antefix_router.chat.plain import PlainFormat
from antefix_router.chat.render import render_tokens
from antefix_router.chat.template import TemplateFormat
from tests.gateway.bodies import SCHEMA
from tests.gateway.scripted import MODEL, Script, make_front, serving
from tests.waiting import AT_MOST_S

ROOT = Path(__file__).parents[2]
TOOL = {"name": "read", "description": "Reads.", "parameters": SCHEMA}
SYSTEM = "You are an agent in a terminal. " * 8
BY_REQUEST = "x-anthropic-billing-header: cc_version=2.1.197.{0}; cc_entrypoint=cli; cch=f{0};"
BY_SESSION = "x-anthropic-billing-header: cc_version=2.1.197.{0}; cc_entrypoint=cli;"
CHATML = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}<|assistant|>"


def text_of(tokens):
    return bytes(token for token in tokens if token < 256).decode()


def system(*parts):
    starts = [sum(map(len, parts[:number])) for number in range(len(parts))]
    return Message(role=ChatRole.SYSTEM, content="".join(parts), part_starts=tuple(starts))


def moved(*messages, rules=SHIPPED):
    return move_lines(Conversation(messages=messages), rules)


def user(text="hi"):
    return Message(role=ChatRole.USER, content=text)


@pytest.mark.parametrize("parts", [(BY_SESSION, SYSTEM), (BY_SESSION + "\n" + SYSTEM,), (BY_SESSION + "\r\n", SYSTEM)])
def test_a_block_or_a_first_line_is_moved_and_nothing_else(parts):
    conversation, found = moved(system(*parts), user())
    assert [each.content for each in conversation.messages] == [SYSTEM, BY_SESSION, "hi"] and not conversation.aside
    assert [each.role for each in conversation.messages] == [ChatRole.SYSTEM, ChatRole.USER, ChatRole.USER]
    assert [each.rule.name for each in found] == ["anthropic-billing"]
    conversation, found = moved(system(*(part.replace(BY_SESSION, BY_REQUEST) for part in parts)), user())
    assert [each.content for each in conversation.messages] == [SYSTEM, "hi"] and conversation.aside == BY_REQUEST


def test_what_stands_in_the_middle_or_is_said_later_is_left_alone():
    quoted = "Never write\n" + BY_REQUEST
    for messages in ((system(quoted), user()), (user(BY_REQUEST),), (user(), system(BY_REQUEST), user())):
        conversation, found = moved(*messages)
        assert conversation.messages == messages and not found


def test_a_system_text_of_nothing_else_is_gone():
    conversation, _ = moved(system(BY_SESSION), user())
    assert [each.content for each in conversation.messages] == [BY_SESSION, "hi"]


def test_breakpoints_keep_their_text():
    parts, marks = (BY_SESSION, "Be brief. ", "Be kind."), []
    message = system(*parts)
    for end in (len(parts[0]), len(parts[0] + parts[1]), len(message.content)):
        marks.append(TextBreakpoint(ttl_s=300.0, offset=end))
    whole = TextBreakpoint(ttl_s=300.0)
    conversation, _ = moved(dataclasses.replace(message, breakpoints=(*marks, whole)), user())
    head = conversation.messages[0]
    kept = [head.content[: each.offset] for each in head.breakpoints]
    assert kept == ["Be brief. ", "Be brief. Be kind.", "Be brief. Be kind."]


FORMATS = {
    "deepseek-v4": DeepSeekV4Format(),
    "plain": PlainFormat(),
    "template": TemplateFormat(CHATML, MODEL),
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("line", [BY_SESSION, BY_REQUEST])
def test_every_format_writes_the_line_behind_all_that_stays(name, line):
    tools = (TOOL,) if name == "deepseek-v4" else ()
    prompts = []
    for number in ("19e", "123"):
        said = Conversation(messages=(system(line.format(number), SYSTEM), user("Question.")), tools=tools)
        pieces = FORMATS[name].render(move_lines(said, SHIPPED)[0])
        prompts.append(text_of(render_tokens(pieces, load_tokenizer(MODEL), AnswerMemory(), tenant="").tokens))
    first, second = prompts
    shared = next(i for i in range(len(first)) if first[i] != second[i])
    assert first[:shared].count(SYSTEM) == 1 and first.count(line.format("19e")) == 1
    assert not tools or '"name": "read"' in first[:shared]
    assert ("Question." in first[:shared]) == (line is BY_REQUEST)


@pytest.mark.parametrize("chat_format", ["deepseek-v4", "plain"])
@pytest.mark.parametrize("line", [BY_SESSION, BY_REQUEST])
async def test_turns_go_on_from_the_former_answer_whatever_the_line_says(chat_format, line):
    """An earlier request's line stays in its place, so that its answer hits. A new line goes to the new end."""
    script = Script(say=lambda prompt: "Yes.")
    has_tools = chat_format == "deepseek-v4"
    messages, headers = [], []
    async with (
        serving(make_front(script, ledger=None), chat_format=chat_format) as url,
        httpx2.AsyncClient(base_url=url, timeout=AT_MOST_S) as client,
    ):
        for number in range(4):
            messages.append({"role": "user", "content": f"Question {number}."})
            own = line.format(number if line is BY_REQUEST else "123")
            body = {
                "model": "m",
                "max_tokens": 9,
                "system": [{"type": "text", "text": own}, {"type": "text", "text": SYSTEM}],
                "messages": messages,
                "tools": [{"name": "read", "description": "Reads.", "input_schema": SCHEMA}] if has_tools else [],
            }
            answer = await client.post("/v1/messages", json=body)
            counted = await client.post("/v1/messages/count_tokens", json=body)
            headers.append(answer.headers["antefix-moved"])
            assert counted.headers["antefix-moved"] == headers[-1]
            assert counted.json()["input_tokens"] == len(script.prompts[-1])
            messages.append({"role": "assistant", "content": answer.json()["content"]})
            assert own in text_of(script.prompts[-1])
    for number in range(3):
        so_far = script.prompts[number] + script.generations[number].samples[0].emitted
        assert script.prompts[number + 1][: len(so_far)] == so_far
    assert script.prompts[0][: len(SYSTEM)] == script.prompts[3][: len(SYSTEM)]
    assert f"{len(own)} characters" in headers[-1] and "anthropic-billing" in headers[-1]


async def test_all_apis_move_and_say_so_and_off_leaves_it():
    own = BY_REQUEST.format("abc")
    parts = [{"type": "text", "text": own}, {"type": "text", "text": SYSTEM}]
    said = [{"role": "user", "content": "hi"}]
    bodies = {
        "/v1/chat/completions": {"messages": [{"role": "system", "content": parts}, *said]},
        "/v1/responses": {"instructions": f"{own}\n{SYSTEM}", "input": said},
        "/v1/messages": {"system": f"{own}\n{SYSTEM}", "messages": said, "max_tokens": 9},
    }
    seen = {}
    for setting in ("", OFF):
        script = Script()
        async with (
            serving(make_front(script, ledger=None), prefix_rules=setting) as url,
            httpx2.AsyncClient(base_url=url, timeout=AT_MOST_S) as client,
        ):
            for api, body in bodies.items():
                answer = await client.post(api, json={"model": "m", **body})
                assert answer.status_code == 200 and ("antefix-moved" in answer.headers) == (setting == ""), answer.text
        seen[setting] = [text_of(prompt) for prompt in script.prompts]
    assert len(set(seen[""])) == 1 and seen[""][0].startswith(SYSTEM) and seen[""][0].endswith("hi" + own)
    assert all(prompt.startswith(own) for prompt in seen[OFF])


async def test_a_retry_with_its_id_is_the_same_request():
    script = Script()
    body = {"model": "m", "system": BY_REQUEST, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 9}
    headers = {"idempotency-key": "once"}
    async with (
        serving(make_front(script, ledger=None)) as url,
        httpx2.AsyncClient(base_url=url, headers=headers, timeout=AT_MOST_S) as client,
    ):
        answers = [await client.post("/v1/messages", json=body) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [200, 200] and len(script.prompts) == 1


def test_the_shipped_example_loads_and_comes_before_the_shipped_rules(tmp_path):
    rules = load_rules(str(ROOT / "deploy" / "prefix_rules.toml"))
    assert [rule.name for rule in rules] == ["proxy-trace", *(rule.name for rule in SHIPPED)]
    # The rules that the file shows as comments are also valid.
    text = (ROOT / "deploy" / "prefix_rules.toml").read_text()
    shown = text[text.index("# [[rule]]") :].replace("# ", "")
    (tmp_path / "rules.toml").write_text(f"shipped = false\n{shown}")
    rules = load_rules(str(tmp_path / "rules.toml"))
    env = "You are here.\n<env>\n  Working directory: /home/ann\nToday's date: 2026-11-29\nPlatform: linux\n</env>"
    conversation, found = moved(system(env), user(), rules=rules)
    assert [each.rule.name for each in found] == ["working-directory", "date"]
    assert [each.content for each in conversation.messages] == [
        "You are here.\n<env>\nPlatform: linux\n</env>",
        "  Working directory: /home/ann\nToday's date: 2026-11-29",
        "hi",
    ]
    assert not moved(system(env), user())[1]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[[rules]]", "unknown names: rules"),
        ("[[rule]]\nname = 'a'", "line is missing"),
        ("[[rule]]\nname = 'A'\nline = 'x'\nchanges = 'request'", "needs a name"),
        ("[[rule]]\nname = 'a'\nline = '('\nchanges = 'request'", "regular expression"),
        ("[[rule]]\nname = 'a'\nline = '.*'\nchanges = 'request'", "every line"),
        ("[[rule]]\nname = 'a'\nline = 'x'\nchanges = 'daily'", "one of session, request"),
        ("[[rule]]\nname = 'a'\nline = 'x'\nchanges = 'request'\nplace = 1", "unknown names: place"),
        ("[[rule]]\nname = 'a'\nline = 'x'\nchanges = 'session'\n" * 2, "two rules"),
        ("shipped = 1", "shipped must be true or false"),
        ("rule = 1", "tables, each under"),
        ("x", "prefix rules"),
    ],
)
def test_a_file_of_another_form_is_refused(tmp_path, text, why):
    (tmp_path / "rules.toml").write_text(text)
    with pytest.raises(ConfigError, match=why):
        load_rules(str(tmp_path / "rules.toml"))


def test_an_answer_that_was_begun_comes_behind_the_line():
    said = (system(BY_REQUEST, SYSTEM), user(), Message(role=ChatRole.ASSISTANT, content="Well,"))
    conversation = Conversation(messages=said, continue_last=True, effort=Effort.NONE)
    for name in ("deepseek-v4", "plain"):
        pieces = FORMATS[name].render(move_lines(conversation, SHIPPED)[0])
        text = text_of(render_tokens(pieces, load_tokenizer(MODEL), AnswerMemory(), tenant="").tokens)
        assert text.endswith("Well,") and text.index("hi") < text.index(BY_REQUEST) < text.index("Well,")


def test_asides_of_one_tenant_are_not_another_ones():
    memory, tokenizer = AnswerMemory(), load_tokenizer(MODEL)
    turn = (user(), Message(role=ChatRole.ASSISTANT, content="Yes."), user("more"))
    begun = PlainFormat().render(Conversation(messages=turn[:1], aside="secret"))
    memory.keep_aside(*render_tokens(begun, tokenizer, memory, tenant="a").aside)
    later = PlainFormat().render(Conversation(messages=turn, aside="next"))
    shown = {tenant: text_of(render_tokens(later, tokenizer, memory, tenant=tenant).tokens) for tenant in "ab"}
    assert "secret" in shown["a"] and "secret" not in shown["b"] and json.dumps(shown).count("next") == 2
