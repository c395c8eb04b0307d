"""Writes real requests to files that keep their shape, with made-up short texts. test_recorded.py replays them.

A file keeps keys, types, numbers, texts that we wrote (directives, answers, results of our tools), and names that the
door reads. Every longer text and every id of a machine, a person or a session is replaced by a made-up one. Of several
tools with the same shape, one is kept.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

from antefix.secret import Keyring
from antefix_router.gateway.signatures import Signatures
from tests.clients.door import Door, Exchange

RECORDED = Path(__file__).parent / "recorded"
SIGNATURES = Signatures(Keyring(b"0" * 16), "")  # as tests/gateway/scripted.py has them

# The headers that say what was done with the request. Other headers say what the cache did.
TOLD = tuple(f"antefix-{name}" for name in ("ignored", "left-out", "moved", "restored-thinking", "foreign-thinking"))
_LONGEST = 48
_OURS = re.compile(
    r"\[\[(?:run|read|say|call|result)|It said:|I look\.|Let me see\.|got-4|^\{\"(?:command|cmd|path|file)"
)
_KEPT_TEXTS = re.compile(r"^(?:data:image/|iVBORw0KGgo|x-anthropic-billing-header:|claude-|gpt-|[a-z_]+_20\d{6}$)")
_HEX = re.compile(r"\b[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}\b|\b[0-9a-f]{32,64}\b")
# Headers that differ by connection are left out, and secret ones are replaced.
_LEFT_OUT_HEADERS = ("host", "content-length", "connection", "accept-encoding", "transfer-encoding")
_SECRET_HEADERS = ("authorization", "x-api-key")
_WORDS = [
    "blue",
    "stone",
    "river",
    "light",
    "field",
    "north",
    "paper",
    "wheel",
    "cloud",
    "glass",
    "amber",
    "forest",
    "signal",
    "harbor",
    "copper",
    "winter",
]


def record(name: str, door: Door, **folders: Path) -> None:
    """Write the requests that the door got in this session, if RECORD_CLIENTS is set (`make record-clients`)."""
    if "RECORD_CLIENTS" not in os.environ:
        return
    maker = _Synthetic(folders)
    turns = door.turns()
    called = _names_in(turns[-1].body)
    bodies = [maker.body(each.body, called) for each in turns]
    shared = {key: value for key, value in bodies[0].items() if all(body.get(key) == value for body in bodies)}
    recorded = {
        "client": turns[0].headers.get("user-agent", ""),
        "path": turns[0].path,
        # These counts are of the whole requests, before texts were cut. docs/CLIENTS.md quotes them.
        "prompt_tokens": [len(door.generation_of(each).request.tokens) for each in turns],
        "hit_tokens": [door.hit_of(each) for each in turns],
        "headers": maker.headers(turns[0]),
        "shared": shared,
        "turns": [
            {
                "body": {key: value for key, value in body.items() if key not in shared},
                "told": {key: value for key, value in each.answered.items() if key in TOLD},
            }
            for each, body in zip(turns, bodies, strict=True)
        ],
    }
    RECORDED.mkdir(exist_ok=True)
    (RECORDED / f"{name}.json").write_text(json.dumps(recorded, indent=1, ensure_ascii=False) + "\n")


class _Synthetic:
    """Replaces a session's texts. The same text always gets the same replacement."""

    def __init__(self, folders: dict[str, Path]) -> None:
        self._folders = folders

    def headers(self, exchange: Exchange) -> dict[str, str]:
        headers = {name: value for name, value in exchange.headers.items() if name not in _LEFT_OUT_HEADERS}
        return {name: "k" if name in _SECRET_HEADERS else self._without_ids(value) for name, value in headers.items()}

    def body(self, body: dict[str, Any], called: set[str]) -> dict[str, Any]:
        body = {**body, "tools": _one_of_each_shape(body["tools"], called)}
        return {key: self._value(value, key) for key, value in body.items()}

    def _value(self, value: Any, key: str) -> Any:
        if isinstance(value, dict):
            made = {name: self._value(each, name) for name, each in value.items()}
            # The replay makes these values again, as the door would sign and seal them at that time.
            if value.get("type") == "thinking" and value.get("signature"):
                made["signature"] = "(signed)"
            if value.get("encrypted_content"):
                made["encrypted_content"] = f"(sealed){SIGNATURES.open(value['encrypted_content'])}"
            return made
        if isinstance(value, list):
            return [self._value(each, key) for each in value]
        return self.text(value) if isinstance(value, str) else value

    def text(self, text: str) -> str:
        text = self._without_ids(text)
        is_short = len(text) <= _LONGEST and text.count(" ") < 3
        if is_short or _KEPT_TEXTS.search(text) or _is_json(text):
            return text
        return text if _OURS.search(text) and len(text) < 400 else _words_for(text)

    def _without_ids(self, text: str) -> str:
        for name, folder in self._folders.items():
            text = text.replace(str(folder), f"/synthetic/{name}")
        text = re.sub(r"/tmp/pytest-of-\w+/pytest-\d+/\w+", "/synthetic", text)
        return _HEX.sub(lambda found: _digits_like(found.group()), text)


def _is_json(text: str) -> bool:
    """Whether a text is short JSON, such as arguments or ids. Such texts are ours, or were already replaced."""
    return text.startswith(("{", "[{")) and len(text) < 400


def _digits_like(text: str) -> str:
    digest = hashlib.sha256(text.encode()).hexdigest() * 2
    return "".join("-" if each == "-" else digest[index] for index, each in enumerate(text))


def _words_for(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return " ".join(_WORDS[each % len(_WORDS)] for each in digest[:8])


def _names_in(body: dict[str, Any]) -> set[str]:
    """The names of the tools that a conversation calls."""
    return set(re.findall(r'"(?:tool_)?name": "([^"]*)"', json.dumps(body.get("messages") or body.get("input"))))


def _one_of_each_shape(tools: list[dict[str, Any]], called: set[str]) -> list[dict[str, Any]]:
    """The tools that are called, and one tool for each set of fields."""
    kept, shapes = [], set()
    for tool in tools:
        inner = tool.get("function", tool)
        shape = (tool.get("type"), *sorted(tool), *sorted(inner))
        if shape not in shapes or inner.get("name") in called:
            kept.append(tool)
        shapes.add(shape)
    return kept


def replayed(value: Any) -> Any:
    """A recorded body as its client would send it now, with thinking signed and sealed by this door."""
    if isinstance(value, list):
        return [replayed(each) for each in value]
    if not isinstance(value, dict):
        return value
    made = {name: replayed(each) for name, each in value.items()}
    if made.get("signature") == "(signed)":
        made["signature"] = SIGNATURES.sign(made["thinking"])
    sealed = made.get("encrypted_content")
    if isinstance(sealed, str) and sealed.startswith("(sealed)"):
        made["encrypted_content"] = SIGNATURES.seal(sealed.removeprefix("(sealed)"))
    return made
