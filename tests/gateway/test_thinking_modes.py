"""Every way to ask for thinking selects one of the modes off, high and max."""

import json

import httpx2
import pytest

from tests.gateway.agents_door import CHAT_URL, MESSAGES_URL, MODEL, RESPONSES_URL, asked, chat, user
from tests.gateway.scripted import Script, make_front, serving
from tests.waiting import AT_MOST_S

OFF, HIGH, MAX = "off", "high", "max"
MODES = [
    ({}, HIGH),
    ({"thinking": {"type": "enabled"}}, HIGH),
    ({"thinking": {"type": "adaptive"}}, HIGH),
    ({"thinking": {"type": "disabled"}}, OFF),
    ({"thinking": {"type": "enabled", "budget_tokens": 31_999}}, HIGH),
    ({"thinking": {"type": "enabled", "budget_tokens": 0}}, OFF),
    ({"thinking": {"budget_tokens": 1024}}, HIGH),
    ({"thinking": True}, HIGH),
    ({"thinking": False}, OFF),
    ({"reasoning_effort": "none"}, OFF),
    ({"reasoning_effort": "minimal"}, HIGH),
    ({"reasoning_effort": "low"}, HIGH),
    ({"reasoning_effort": "medium"}, HIGH),
    ({"reasoning_effort": "max"}, MAX),
    ({"reasoning_effort": "auto"}, HIGH),
    ({"reasoning": {"effort": "max"}}, MAX),
    ({"reasoning": {"effort": "none", "summary": "auto"}}, OFF),
    ({"reasoning": {"enabled": False}}, OFF),
    ({"reasoning": {"max_tokens": 2000, "exclude": True}}, HIGH),
    ({"enable_thinking": False}, OFF),
    ({"enable_thinking": True, "thinking_budget": 100}, HIGH),
    ({"thinking_budget": 0}, OFF),
    ({"chat_template_kwargs": {"thinking": False}}, OFF),
    ({"chat_template_kwargs": {"enable_thinking": True, "reasoning_effort": "max"}}, MAX),
    ({"thinking": {"type": "disabled"}, "reasoning_effort": "max"}, OFF),
    ({"thinking": {"type": "enabled"}, "reasoning_effort": "max"}, MAX),
]


@pytest.mark.parametrize(("wish", "mode"), MODES, ids=lambda value: json.dumps(value)[:60])
async def test_every_way_to_ask_for_thinking_is_off_high_or_max(door, wish, mode):
    # off unless the request asks for it
    anthropic_mode = mode if wish and wish != {"reasoning_effort": "auto"} else OFF
    for address, body, right in (
        (CHAT_URL, chat(user("hi"), **wish), mode),
        (RESPONSES_URL, {"model": MODEL, "input": "hi", **wish}, mode),
        (MESSAGES_URL, asked(user("hi"), **wish), anthropic_mode),
    ):
        answer = await door.ok(address, body)
        assert answer.headers["antefix-mode"] == right == door.records[-1].mode
        begins = "Reasoning Effort: Absolute maximum" in door.prompt
        assert door.prompt.endswith("</think>" if right == OFF else "<think>") and begins == (right == MAX)


@pytest.mark.parametrize("effort", ["low", "high", "max"])
async def test_anthropics_effort_is_a_mode(door, effort):
    answer = await door.ok(
        MESSAGES_URL, asked(user("hi"), thinking={"type": "adaptive"}, output_config={"effort": effort})
    )
    assert answer.headers["antefix-mode"] == (MAX if effort == "max" else HIGH)


async def test_a_model_that_cannot_think_answers_without():
    script = Script()
    async with (
        serving(make_front(script, ledger=None)) as url,
        httpx2.AsyncClient(base_url=url, timeout=AT_MOST_S) as client,
    ):
        answer = await client.post(CHAT_URL, json=chat(user("hi"), reasoning_effort="high"))
    assert answer.status_code == 200 and answer.headers["antefix-mode"] == OFF
    assert answer.headers["antefix-ignored"] == "reasoning_effort"


@pytest.mark.parametrize(
    ("address", "wish", "param"),
    [
        (CHAT_URL, {"thinking": {"type": "sometimes"}}, "thinking.type"),
        (CHAT_URL, {"reasoning_effort": "heroic"}, "reasoning_effort"),
        (CHAT_URL, {"enable_thinking": "yes"}, "enable_thinking"),
        (RESPONSES_URL, {"reasoning": {"effort": "heroic"}}, "reasoning.effort"),
        (MESSAGES_URL, {"output_config": {"effort": 5}}, "output_config.effort"),
    ],
)
async def test_a_mode_that_nobody_knows_is_refused_by_name(door, address, wish, param):
    base = {"model": MODEL, "input": "hi"} if address == RESPONSES_URL else asked(user("hi"))
    assert (await door.refused(address, {**base, **wish}))[0] == param
