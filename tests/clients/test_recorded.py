"""Replays real programs' requests: each is answered, and hits up to the last full block of the previous answer.

`make record-clients` recorded the requests, and recording.py replaced and cut their texts. The door gives the answers
that the programs sent back.
"""

import json
from pathlib import Path

import httpx2
import pytest

from tests.clients.conversations import hits_and_full_blocks, hits_table
from tests.clients.recording import RECORDED, TOLD, replayed
from tests.waiting import AT_MOST_S

FILES = sorted(RECORDED.glob("*.json"))


def test_every_program_is_recorded():
    names = {path.stem for path in FILES}
    assert {"claude_code", "codex", "opencode", "ai_sdk_anthropic", "openai_chat", "litellm", "pydantic_ai"} <= names


def session(path):
    """A recorded session. Strict tools start a process, which tries out their grammars."""
    marks = [pytest.mark.services] if '"strict": true' in path.read_text() else []
    return pytest.param(path, id=path.stem, marks=marks)


@pytest.mark.parametrize("path", [session(path) for path in FILES])
async def test_a_recorded_session(path, door):
    recorded = json.loads(path.read_text())
    async with httpx2.AsyncClient(base_url=door.url, headers=recorded["headers"], timeout=AT_MOST_S) as client:
        for number, turn in enumerate(recorded["turns"]):
            body = replayed({**recorded["shared"], **turn["body"]})
            answer = await client.post(recorded["path"], json=body)
            assert answer.status_code == 200, answer.text
            told = {name: value for name, value in answer.headers.items() if name.startswith("antefix-")}
            assert _without_tools(told) == _without_tools(turn["told"]), f"turn {number}"
    texts = door.script.texts
    assert "It said: " in door.script.last_answer and "got-49" in door.script.last_answer and "got-42" in texts[-1]
    assert "iVBORw0KGgo" not in texts[-1]
    hits, full = hits_and_full_blocks(door)
    assert hits[1:] == full[1:] and all(full[1:])


def _without_tools(told: dict[str, str]) -> dict[str, str]:
    """The headers without numbers of tools, which differ because most tools are not in the recording."""
    lists = {
        name: [each for each in value.split(", ") if not each.startswith("tools[")]
        for name, value in told.items()
        if name in TOLD
    }
    return {name: ", ".join(value) for name, value in lists.items() if value}


def test_the_document_has_the_recorded_figures():
    document = (Path(__file__).parents[2] / "docs" / "CLIENTS.md").read_text()
    assert hits_table(RECORDED) in document
    for path in FILES:
        recorded = json.loads(path.read_text())
        assert len(recorded["hit_tokens"]) == len(recorded["prompt_tokens"]) == len(recorded["turns"])
