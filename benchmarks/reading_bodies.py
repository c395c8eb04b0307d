"""What does reading a request's body cost, and would msgspec read it faster?

    python benchmarks/reading_bodies.py        (needs `pip install msgspec`, which is not a dependency of Antefix)

The body is that of an agent: 27 KB of system text, 20 tools, a history of 60 turns with tool calls. Figures are
microseconds per body, the best of several rounds; lower is better. "fields" is the router's work after parsing: it
reads every field, checks types, and reports unknown fields with their paths.
"""

from __future__ import annotations

import json
import timeit
from collections.abc import Callable
from typing import Any

import msgspec

from antefix.secret import Keyring
from antefix_router.gateway.anthropic_messages import anthropic_messages
from antefix_router.gateway.fields import Fields
from antefix_router.gateway.notes import Notes
from antefix_router.gateway.signatures import Signatures
from antefix_router.gateway.tools import anthropic_tools

NUM_TOOLS, NUM_TURNS, NUM_ROUNDS = 20, 60, 5


class Block(msgspec.Struct):
    """A message block as a typed msgspec decoder defines it; the decoder silently drops or refuses unknown fields."""

    type: str
    text: str = ""
    id: str = ""
    name: str = ""
    input: Any = None
    tool_use_id: str = ""
    content: Any = None


class Turn(msgspec.Struct):
    role: str
    content: str | list[Block]


class Body(msgspec.Struct):
    model: str
    max_tokens: int
    messages: list[Turn]
    system: str | list[Block] = ""
    tools: list[dict[str, Any]] = []


def body() -> bytes:
    schema = {"type": "object", "properties": {f"p{n}": {"type": "string", "description": "d" * 80} for n in range(8)}}
    turns: list[dict[str, Any]] = []
    for number in range(NUM_TURNS):
        use = {"type": "tool_use", "id": f"t{number}", "name": "tool_1", "input": {"p1": "x" * 200}}
        result = {"type": "tool_result", "tool_use_id": f"t{number}", "content": 'line "of" a file\n' * 60}
        turns += [
            {"role": "user", "content": [{"type": "text", "text": "Once more. " * 10}]},
            {"role": "assistant", "content": [{"type": "text", "text": "I look."}, use]},
            {"role": "user", "content": [result]},
        ]
    tools = [{"name": f"tool_{n}", "description": "D" * 1500, "input_schema": schema} for n in range(NUM_TOOLS)]
    system = [{"type": "text", "text": "You are careful. " * 1600, "cache_control": {"type": "ephemeral"}}]
    asked = {"model": "m", "max_tokens": 32_000, "system": system, "tools": tools, "messages": turns}
    return json.dumps(asked).encode()


def read_fields(parsed: Any) -> None:
    fields = Fields(parsed, notes=Notes())
    anthropic_tools(fields)
    anthropic_messages(fields, Signatures(Keyring(b"0" * 16), ""))
    fields.close()


def best_us(work: Callable[[], Any]) -> float:
    return min(timeit.repeat(work, number=20, repeat=NUM_ROUNDS)) / 20 * 1e6


def main() -> None:
    raw = body()
    parsed = json.loads(raw)
    untyped, typed = msgspec.json.Decoder(), msgspec.json.Decoder(Body)
    print(f"a body of {len(raw):,} bytes, {len(parsed['messages'])} messages; us")
    print(f"json.loads               {best_us(lambda: json.loads(raw)):8.0f}")
    print(f"msgspec, untyped         {best_us(lambda: untyped.decode(raw)):8.0f}")
    print(f"msgspec, structs         {best_us(lambda: typed.decode(raw)):8.0f}")
    print(f"fields, after parsing    {best_us(lambda: read_fields(parsed)):8.0f}")


if __name__ == "__main__":
    main()
