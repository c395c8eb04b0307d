"""Claude Code's sessions (`~/.claude/projects/*/*.jsonl`), and the published traces of such sessions.

A session's lines form a tree by `parentUuid`. An assistant message, which may take several lines, is one call, and its
prompt consists of all lines above it. A session's file contains neither the system prompt nor the tools. The length of
the missing system prompt and tools follows from the call's count of input tokens; sessions with the same client, folder
and kind of agent have the same ones.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from antefix_simulate.logs.chat_text import message_bytes
from antefix_simulate.logs.log_fields import LoggedUsage, time_in, usage_in
from antefix_simulate.logs.log_rows import json_rows
from antefix_simulate.logs.logged_call import Ignored, LoggedCall

# Used where a session is too short to measure this: bytes per token of code and English with such models' tokenizers.
_BYTES_PER_TOKEN: Final = 3.6
_DEPTH_MAX: Final = 1_000_000


@dataclass(slots=True)
class _Line:
    """One line of a conversation. message: for an assistant's line, the id of the message that it belongs to."""

    parent: str
    text: bytes
    at_s: float | None
    message: str
    usage: LoggedUsage
    head: str
    session: str
    output_bytes: int = 0


@dataclass(frozen=True, slots=True)
class _Call:
    first: _Line
    text: bytes
    at_s: float | None
    root: str


def read_claude_code(path: Path, ignored: Ignored) -> Iterator[LoggedCall]:
    """A session's file, or a folder with some. Raises:  InvalidRequest: a file cannot be read to its end."""
    files = sorted(path.rglob("*.jsonl")) if path.is_dir() else [path]
    lines: dict[str, _Line] = {}
    for file in files:
        for row in json_rows(file, ignored):
            _note(row, lines, ignored)
    calls = list(_calls(lines))
    rate = _bytes_per_token(calls)
    heads = _head_tokens(calls, rate)
    for call in calls:
        usage = call.first.usage
        yield LoggedCall(
            at_s=call.at_s,
            text=call.text,
            num_tokens=usage.prompt,
            output_tokens=usage.output,
            output_bytes=call.first.output_bytes,
            cached_tokens=usage.cached,
            head=call.first.head,
            head_tokens=heads.get(call.first.head, 0),
            session=call.first.session,
        )


def _note(row: dict[str, Any], lines: dict[str, _Line], ignored: Ignored) -> None:
    message, uuid = row.get("message"), row.get("uuid")
    if not isinstance(message, dict) or not isinstance(uuid, str) or row.get("type") not in ("user", "assistant"):
        # Titles, file snapshots and hooks are no part of a prompt. Lines after them still refer to them as parents.
        if isinstance(uuid, str):
            lines[uuid] = _Line(str(row.get("parentUuid") or ""), b"", None, "", LoggedUsage(), "", "")
        else:
            ignored.count(f"lines of type {str(row.get('type'))[:40]}")
        return
    text = message_bytes({"role": message.get("role"), "content": message.get("content")}, ignored)
    is_assistant = row["type"] == "assistant"
    lines[uuid] = _Line(
        parent=str(row.get("parentUuid") or ""),
        text=text,
        at_s=time_in(row),
        message=str(message.get("id") or row.get("requestId") or uuid) if is_assistant else "",
        usage=usage_in(message) if is_assistant else LoggedUsage(),
        head="\x00".join(str(row.get(name) or "") for name in ("version", "cwd", "isSidechain")),
        session=str(row.get("sessionId") or ""),
        output_bytes=len(text) if is_assistant else 0,
    )


def _calls(lines: dict[str, _Line]) -> Iterator[_Call]:
    """The calls in the order in which the file has them. The first line of a message is the call; later lines add to
    its answer.
    """
    seen: dict[str, _Line] = {}
    firsts: list[_Line] = []
    for line in lines.values():
        if not line.message:
            continue
        first = seen.setdefault(line.message, line)
        if first is line:
            firsts.append(line)
        else:
            first.output_bytes += line.output_bytes
            first.usage = line.usage if line.usage.prompt else first.usage
    for first in firsts:
        above: list[_Line] = []
        at = lines.get(first.parent)
        while at is not None and len(above) < _DEPTH_MAX:
            above.append(at)
            at = lines.get(at.parent)
        if first.usage.prompt == 0 or not above:
            continue  # the client made this message itself, such as an error
        asked_s = next((line.at_s for line in above if line.at_s is not None), None)
        root = f"{first.session}\x00{id(above[-1])}"
        yield _Call(first, b"".join(line.text for line in reversed(above)), asked_s or first.at_s, root)


def _bytes_per_token(calls: list[_Call]) -> float:
    """The rate is measured from the growth between two calls of one conversation, because the tokens before the text
    are equal in both.
    """
    last: dict[str, _Call] = {}
    rates = []
    for call in calls:
        before = last.get(call.root)
        last[call.root] = call
        if before is None or call.first.usage.prompt is None or before.first.usage.prompt is None:
            continue
        tokens, nbytes = call.first.usage.prompt - before.first.usage.prompt, len(call.text) - len(before.text)
        if tokens > 0 and nbytes > 0 and 1 <= nbytes / tokens <= 12:
            rates.append(nbytes / tokens)
    return statistics.median(rates) if rates else _BYTES_PER_TOKEN


def _head_tokens(calls: list[_Call], rate: float) -> dict[str, int]:
    """Tokens by head. The smallest estimate is used, because text that the log lacks makes a head look longer."""
    heads: dict[str, int] = {}
    for call in calls:
        if call.first.usage.prompt is not None:
            tokens = max(0, call.first.usage.prompt - round(len(call.text) / rate))
            heads[call.first.head] = min(heads.get(call.first.head, tokens), tokens)
    return heads
