"""A separate process tries out grammars. Hostile grammars are refused in time and delay no other request."""

import asyncio
import json
import time

import pytest

from antefix.errors import Overloaded
from antefix_router import grammar_check
from antefix_router.grammar_check import GrammarCheck, UnusableGrammar
from tests.engines import MODEL

pytestmark = pytest.mark.services


def of(schema):
    return f"start: %json {json.dumps(schema)}\n"


@pytest.fixture
async def check():
    made = GrammarCheck(MODEL, 264)
    yield made
    await made.close()


def deep(levels):
    schema = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "array", "items": schema}
    return schema


async def test_what_can_be_followed_passes_and_what_cannot_is_refused_with_a_reason(check):
    await check.check(of({"type": "object", "properties": {"a": {"type": "integer"}}}))
    for schema, reason in [
        ({"type": "integer", "minimum": 5, "maximum": 4}, "minimum"),
        ({"type": "string", "pattern": "("}, "regex"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}, "."),
        ({"allOf": [{"anyOf": [{"required": [f"{i}{j}"]} for j in range(10)]} for i in range(10)]}, "too large"),
        (deep(200), "recursion"),
        ({"enum": []}, "Unsatisfiable"),
    ]:
        with pytest.raises(UnusableGrammar, match=reason):
            await check.check(of(schema))
    with pytest.raises(UnusableGrammar, match="bytes"):
        await check.check("x" * (1 << 20))


# Grammars for which the engine has no limit: an intersection of many automata, and an automaton of a million states.
HOSTILE = [
    {"allOf": [{"type": "string", "pattern": f"(a|b)*a(a|b){{{i}}}"} for i in range(50)]},
    {"type": "integer", "multipleOf": 999983},
]


@pytest.mark.parametrize("schema", HOSTILE, ids=["intersection", "multiple"])
async def test_a_hostile_schema_is_ended_while_the_loop_goes_on_and_the_next_is_answered(check, schema):
    await check.check(of({"type": "null"}))
    first = check._process
    asking = asyncio.create_task(check.check(of(schema)))
    num_turns, begun = 0, time.thread_time()
    while not asking.done():
        await asyncio.sleep(0.1)
        num_turns += 1
    with pytest.raises(UnusableGrammar, match="2 s"):
        await asking
    # The work takes 2 s of processor time, but not in this thread, and this thread does not wait for it.
    assert num_turns > 3 and time.thread_time() - begun < 1.0
    second = check._process
    # The grammar is now known, so it does not need a process again.
    with pytest.raises(UnusableGrammar, match="2 s"):
        await check.check(of(schema))
    assert second is None and check._process is None
    await check.check(of({"type": "boolean"}))
    assert check._process is not first


async def test_equal_grammars_are_tried_once(check, monkeypatch):
    asked = []
    ask = check._ask

    async def counted(grammar):
        asked.append(grammar)
        return await ask(grammar)

    monkeypatch.setattr(check, "_ask", counted)
    await asyncio.gather(*(check.check(of({"type": "null"})) for _ in range(5)))
    assert len(asked) == 1


async def test_a_caller_that_leaves_takes_no_answer_from_the_next(check):
    await check.check(of({"type": "null"}))
    leaving = asyncio.create_task(check.check(of({"type": "integer", "minimum": 5, "maximum": 4})))
    await asyncio.sleep(0)
    leaving.cancel()
    await asyncio.gather(leaving, return_exceptions=True)
    assert leaving.cancelled()
    await check.check(of({"type": "boolean"}))
    leaving = asyncio.create_task(check.check(of({"type": "string"})))
    await asyncio.sleep(0)
    leaving.cancel()
    await asyncio.gather(leaving, return_exceptions=True)
    with pytest.raises(UnusableGrammar):
        await check.check(of({"type": "integer", "minimum": 5, "maximum": 4}))


async def test_too_many_that_wait_are_told_so(check, monkeypatch):
    monkeypatch.setattr(grammar_check, "NUM_WAITING_MAX", 1)
    first = asyncio.create_task(check.check(of({"type": "null"})))
    await asyncio.sleep(0)
    with pytest.raises(Overloaded):
        await check.check(of({"type": "boolean"}))
    await first


async def test_no_more_are_remembered_than_may_be(check, monkeypatch):
    monkeypatch.setattr(grammar_check, "NUM_KNOWN_MAX", 2)
    for number in range(4):
        await check.check(of({"const": number}))
    assert len(check._known) == 2
