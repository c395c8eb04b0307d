"""Real programs hold real sessions at the door: turns are answered, tools run, and prompts hit all earlier blocks.

Each prompt hits up to the last full block of the previous answer, over several turns, with a picture, in a resumed
session, and after a cancelled answer. The model is a script (tests/clients/scripted_model.py), because the small
model's text is of no use to an agent.
"""

import asyncio

import pytest

from tests.clients import programs
from tests.clients.conversations import hits_and_full_blocks
from tests.clients.recording import record
from tests.clients.scripted_model import BLOCK_SIZE, answer_of
from tests.waiting import AT_MOST_S, until

pytestmark = [pytest.mark.clients, pytest.mark.services, programs.needs_programs]

LOOK = "[[task]] Look around. [[run: echo got-$((6*7))]] [[read: {picture}]] [[result]]"
AGAIN = "[[task]] And again. [[run: echo got-$((7*7))]] [[result]]"
SLOW = "[[task]] Take your time. [[say: " + "slow " * 400 + "]]"

# By name: what makes the program, the arguments of a new session, and those of a resumed one.
AGENTS = {
    "claude_code": (programs.claude_code, ["--"], ["--continue", "--"]),
    "codex": (
        programs.codex,
        ["--json", "--skip-git-repo-check", "--dangerously-bypass-approvals-and-sandbox"],
        ["resume", "--last", "--json", "--skip-git-repo-check", "--dangerously-bypass-approvals-and-sandbox"],
    ),
    "opencode": (programs.opencode, ["--auto"], ["--auto", "--continue"]),
}


@pytest.mark.parametrize("name", AGENTS)
async def test_an_agents_session(name, door, home, folder, picture):
    make, new, resumed = AGENTS[name]
    program = make(door.url, home, folder)
    ended = await program.run(*new, LOOK.format(picture=picture))
    assert ended.status == 0 and "It said: " in ended.out, ended.last
    assert "got-42" in door.script.last_prompt and "[image: not shown" in door.script.last_prompt
    ended = await program.run(*resumed, AGAIN)
    assert ended.status == 0 and "got-49" in ended.out and "got-49" in door.script.last_answer, ended.last
    assert [each.status for each in door.turns()] == [200] * 5
    # Each prompt hits up to the last full block of the previous answer, whatever requests for titles came in between.
    hits, full = hits_and_full_blocks(door)
    assert hits[1:] == full[1:] and all(full[1:])
    record(name, door, home=home, folder=folder)

    # Cancel an answer in the middle: its work stops, and the session can continue.
    door.script.pause_s = 0.01
    num_requests = len(door.script.requests)
    running = await program.start(*resumed, SLOW)
    await until(lambda: any(len(answer_of(each)) > 40 for each in door.script.generations[num_requests:]))
    await running.interrupt()
    await until(lambda: door.script.num_cancelled == 1)
    door.script.pause_s = 0.0
    ended = await program.run(*resumed, AGAIN)
    assert ended.status == 0 and "got-49" in door.script.last_answer, ended.last
    before = door.turns()[4]
    hits, _ = hits_and_full_blocks(door)
    assert hits[-1] > door.hit_of(before), "what came before the cancelled turn hits"


async def test_a_tool_that_claude_code_finds_is_shown_where_it_was_found(door, home, folder):
    """Claude Code inserts a found tool into its sorted list.

    If the prompt showed it there, all later text would miss.
    """
    find = '[[task]] [[run: echo got-$((6*7))]] [[call: ToolSearch {"query":"select:NotebookEdit"}]]'
    program = programs.claude_code(door.url, home, folder)
    ended = await program.run("--", f"{find} [[run: echo got-$((7*7))]] [[result]]")
    assert ended.status == 0 and "It said: got-49" in ended.out, ended.last
    assert "[tool: NotebookEdit]" in door.script.last_prompt
    hits, full = hits_and_full_blocks(door)
    assert len(hits) == 4 and hits[1:] == full[1:] and all(full[1:])
    record("claude_code_tool_search", door, home=home, folder=folder)


@pytest.mark.parametrize("provider", ["anthropic", "openai", "openai-chat", "compatible"])
async def test_the_ai_sdk(provider, door, home, picture):
    ended = await programs.ai_sdk(door.url, home, provider).run(LOOK.format(picture=picture), AGAIN)
    assert ended.status == 0, ended.last
    first, second = ended.events()
    assert "not shown" in first["text"] and second["text"] == "It said: got-49"
    assert "iVBORw0KGgo" not in "".join(door.script.texts)
    hits, full = hits_and_full_blocks(door)
    assert len(hits) == 5 and hits[1:] == full[1:] and all(full[1:])
    assert first["cached"] + second["cached"] == hits
    record(f"ai_sdk_{provider.replace('-', '_')}", door, home=home)


# By client: whether a tool's result can hold a picture. Those clients look at one.
PYTHON_CLIENTS = {
    "openai_chat": False,
    "openai_chat_streamed": False,
    "openai_responses": True,
    "anthropic": True,
    "litellm": False,
    "litellm_deepseek": False,
    "litellm_anthropic": False,
    "openai_agents": True,
    "openai_agents_chat": False,
    "pydantic_ai": True,
    "pydantic_ai_responses": True,
    "pydantic_ai_anthropic": True,
    "langchain": False,
    "langchain_responses": True,
    "langchain_anthropic": True,
}


@pytest.mark.parametrize("name", PYTHON_CLIENTS)
async def test_a_python_client(name, door, home, picture):
    look = LOOK.format(picture=picture) if PYTHON_CLIENTS[name] else LOOK.replace("read: {picture}", "run: echo hi")
    ended = await programs.python_client(door.url, home, name).run(look, AGAIN)
    assert ended.status == 0, ended.last
    first, second = (each["text"] for each in ended.events())
    assert second == "It said: got-49" and any("got-42" in text for text in door.script.texts)
    if PYTHON_CLIENTS[name]:
        assert any("[image: not shown" in text for text in door.script.texts)
    else:
        assert first == "It said: hi"
    assert [each.status for each in door.exchanges] == [200] * 5
    hits, full = hits_and_full_blocks(door)
    assert hits[1:] == full[1:] and all(full[1:])
    record(name, door, home=home)


async def test_a_streaming_client_that_leaves_stops_the_work(door, home):
    door.script.pause_s = 0.01
    running = await programs.python_client(door.url, home, "openai_chat_streamed").start(SLOW + " [[say: x]]")
    await until(lambda: any(len(answer_of(each)) > 40 for each in door.script.generations))
    running.process.kill()
    await until(lambda: door.script.num_cancelled == 1)
    await asyncio.wait_for(running.ended(), AT_MOST_S)
    assert door.script.generations[-1].finish_reason == "", "the output was not made to its end"


async def test_a_new_claude_code_session_hits_the_one_before(door, home, folder):
    """A session begins with a line that changes, and the user's id names the session. Neither prevents the hit."""
    program = programs.claude_code(door.url, home, folder)
    for task in ("One", "Another"):
        ended = await program.run("--", f"[[task]] {task}. [[say: Done.]]")
        assert ended.status == 0, ended.last
    first, second = (text.partition("<｜User｜>")[0] for text in door.script.texts)
    assert first == second and "Available Tool Schemas" in first, "system text and tools are the stable prefix"
    assert door.hit_of(door.turns()[1]) >= len(first.encode()) // BLOCK_SIZE * BLOCK_SIZE
