"""A chat request's prompt as bytes in the order in which a cache sees it: tools, system prompt, messages.

The texts are not in the order of any model's chat format. Two requests share a beginning of this text if they share one
in a chat format that keeps the order. Fields that clients change between turns without changing the prompt (cache
marks, signatures) are left out.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any, Final

from antefix_simulate.logs.log_rows import unpacked
from antefix_simulate.logs.logged_call import Ignored

_NOT_PROMPT: Final = frozenset(("cache_control", "signature", "encrypted_content", "status"))
_MEDIA: Final = frozenset(
    (
        "image",
        "image_url",
        "input_image",
        "input_audio",
        "audio",
        "file",
        "input_file",
        "document",
        "video",
        "video_url",
    )
)
# Placeholders that logs write in place of text that they were told to omit.
_REDACTED: Final = ("redacted-by-litellm", "[redacted]", "<redacted>")


def prompt_bytes(body: dict[str, Any], ignored: Ignored) -> bytes:
    """The prompt text of a Chat Completions, Responses or Messages body; empty if there is no text."""
    parts: list[bytes] = []
    for tool in _list(unpacked(body.get("tools") or body.get("functions"))):
        parts.append(b"\x00tool\x00" + _json(tool))
    for name in ("system", "instructions"):
        if body.get(name):
            parts.append(b"\x00system\x00" + b"".join(_content(body[name], ignored)))
    messages = unpacked(body.get("messages") or body.get("input") or body.get("prompt"))
    if isinstance(messages, str):
        parts.append(b"\x00user\x00" + messages.encode(errors="replace"))
    for message in _list(messages):
        parts.append(message_bytes(message, ignored))
    return b"".join(parts)


def message_bytes(message: Any, ignored: Ignored) -> bytes:
    """One message, or one item of a Responses input: its role and its content."""
    if not isinstance(message, dict):
        return b"\x00user\x00" + str(message).encode(errors="replace")
    known = {"role", "content", "type", "id"}
    rest = {name: value for name, value in message.items() if name not in known and value not in (None, "", [], {})}
    role = str(message.get("role") or message.get("type") or "")
    said = b"".join(_content(message.get("content"), ignored))
    return b"\x00" + role.encode(errors="replace") + b"\x00" + said + (_json(rest) if rest else b"")


def is_redacted(text: bytes) -> bool:
    return any(mark.encode() in text[:4096].lower() for mark in _REDACTED)


def _content(content: Any, ignored: Ignored) -> Iterator[bytes]:
    content = unpacked(content)
    if content is None:
        return
    if isinstance(content, str):
        yield content.encode(errors="replace")
    elif isinstance(content, dict):
        yield from _part(content, ignored)
    elif isinstance(content, list):
        for part in content:
            yield from _part(part, ignored) if isinstance(part, dict) else _content(part, ignored)
    else:
        yield _json(content)


def _part(part: dict[str, Any], ignored: Ignored) -> Iterator[bytes]:
    kind = part.get("type")
    if kind in _MEDIA:
        # An image's name stands for the image. How many tokens it takes is known only if the log counts tokens.
        ignored.count("images, sounds and files, whose tokens are known only where the log counts them")
        yield b"\x00media\x00" + hashlib.blake2b(_json(part), digest_size=16).hexdigest().encode()
    elif isinstance(part.get("text"), str):
        yield part["text"].encode(errors="replace")
    elif kind == "tool_result" or ("content" in part and kind is None):
        yield b"\x00result\x00" + b"".join(_content(part.get("content"), ignored))
    else:
        yield _json(part)


def _json(value: Any) -> bytes:
    return json.dumps(_without(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode(
        errors="replace"
    )


def _without(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without(each) for name, each in value.items() if name not in _NOT_PROMPT}
    return [_without(each) for each in value] if isinstance(value, list) else value


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
