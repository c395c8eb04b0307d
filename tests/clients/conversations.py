"""The hits that a session's requests should have, and helpers that wait for a condition."""

from __future__ import annotations

import json
from pathlib import Path

from tests.clients.door import Door
from tests.clients.scripted_model import BLOCK_SIZE, answer_of


def hits_and_full_blocks(door: Door) -> tuple[list[int], list[int]]:
    """By turn: hit tokens, and tokens in whole blocks of the previous prompt and answer (0 for the first turn)."""
    turns = [door.generation_of(each) for each in door.turns()]
    full = [0]
    for before in turns[:-1]:
        full.append((len(before.request.tokens) + len(answer_of(before))) // BLOCK_SIZE * BLOCK_SIZE)
    return [each.restore.hit_tokens for each in turns], full


def hits_table(recorded: Path) -> str:
    """The table of docs/CLIENTS.md."""
    lines = ["| client | sent by | prompt tokens | hit tokens |", "| --- | --- | --- | --- |"]
    for path in sorted(recorded.glob("*.json")):
        figures = json.loads(path.read_text())
        turns = [", ".join(f"{each:,}".replace(",", " ") for each in figures[key]) for key in _FIGURES]
        lines.append(f"| `{path.stem}` | {figures['client'].split(' ')[0]} | {turns[0]} | {turns[1]} |")
    return "\n".join(lines) + "\n"


_FIGURES = ("prompt_tokens", "hit_tokens")
