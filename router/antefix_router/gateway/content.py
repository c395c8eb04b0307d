"""Converts the content of messages into text: parts in the forms of all APIs, cache breakpoints, and media that a text
model cannot see. Pure.

Clients resend the whole history, so a part that is refused once would be refused in every later turn. Only the newest
user message is answered, so an image is refused only there. In earlier messages a short placeholder replaces each
image, the same in every turn.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

from antefix_router.chat.messages import ChatRole, Message, TextBreakpoint
from antefix_router.gateway.fields import Fields, missing, unsupported, wrong_type
from antefix_router.gateway.notes import Notes
from antefix_router.gateway.written_media import placeholder, without_media

CACHE_TTLS_S = {"5m": 300.0, "1h": 3600.0}
_TEXT_PARTS = ("text", "input_text", "output_text", "reasoning_text", "summary_text")
# The names that the APIs use for media that a text model cannot see.
_UNSEEN = {
    **dict.fromkeys(("image", "image_url", "input_image", "computer_screenshot", "image_file"), "image"),
    **dict.fromkeys(("input_audio", "audio", "audio_url"), "audio"),
    **dict.fromkeys(("video", "video_url", "input_video"), "video"),
    **dict.fromkeys(("document", "file", "input_file", "container_upload"), "document"),
}


_MEDIA_FIELDS = (
    *(
        "type",
        "source",
        "image_url",
        "input_audio",
        "audio_url",
        "video_url",
        "file",
        "data",
        "url",
        "detail",
        "format",
    ),
    *("media_type", "file_id", "file_data", "file_url", "filename", "title", "context", "citations"),
)


@dataclass(frozen=True, slots=True)
class Unseen:
    """Content of a message that was replaced by a placeholder. path: its place in the request."""

    path: str
    what: str


@dataclass(slots=True)
class Content:
    """Text that grows part by part."""

    text: str = ""
    breakpoints: list[TextBreakpoint] = field(default_factory=list)
    unseen: list[Unseen] = field(default_factory=list)
    is_inner: bool = False
    part_starts: list[int] = field(default_factory=list)
    # Where a tool's result is, whose text may be a picture in JSON; None for content that is not a result.
    result_at: str | None = None
    # Tools that are shown where a result refers to them.
    deferred: Mapping[str, Any] = field(default_factory=dict)

    def add(self, text: str, ttl_s: float | None = None) -> None:
        """Add a part, and the lifetime of the breakpoint after it, if it has one."""
        if self.result_at is not None:
            text = self._without_media(text, self.result_at)
        self.part_starts.append(len(self.text))
        self.text += text
        if ttl_s is not None:
            self.breakpoints.append(TextBreakpoint(ttl_s=ttl_s, offset=len(self.text)))

    def add_part(self, part: Fields, kind: Any = None) -> None:
        """kind: the type of the part, if it was read already.

        Raises:  WrongField: an unknown kind of part.
        """
        ttl_s = breakpoint_ttl(part)
        if kind is None:
            kind = part.text("type")
        self.add(self._text_of(part, str(kind)), ttl_s)

    def prepend(self, text: str) -> None:
        self.text = text + self.text
        self.part_starts = [0, *(len(text) + start for start in self.part_starts)]
        self.breakpoints = [
            TextBreakpoint(ttl_s=each.ttl_s, offset=len(text) + (each.offset or 0)) for each in self.breakpoints
        ]

    def _without_media(self, text: str, path: str) -> str:
        text, kinds = without_media(text)
        self.unseen += [Unseen(path, what) for what in kinds]
        return text

    def _text_of(self, part: Fields, kind: str) -> str:
        if kind in _TEXT_PARTS:
            part.drop("annotations", "logprobs", "citations")
            return part.text("text")
        if kind == "refusal":
            return part.text("refusal")
        if kind in _UNSEEN:
            return self._document(part) or self._placeholder(part, _UNSEEN[kind])
        if kind == "search_result":
            return "[search result]" if self.is_inner else _search_result(part)
        if kind == "tool_reference":
            return self._tool(part.text("tool_name", "") or part.text("name", ""))
        raise unsupported(part.name_of("type"), f": this model takes text, not {kind[:80]!r}")

    def _tool(self, name: str) -> str:
        schema = self.deferred.get(name)
        return f"[tool: {name}]" if schema is None else f"[tool: {name}]\n{as_json(schema)}\n"

    def _document(self, part: Fields) -> str:
        """The text in a document that consists of text."""
        source = part.peek("source")
        if not isinstance(source, dict):
            return ""
        if source.get("type") == "text" and isinstance(source.get("data"), str):
            title = part.text("title", "")
            self._drop_media(part)
            return f"{title}\n{source['data']}" if title else str(source["data"])
        if source.get("type") == "content" and not self.is_inner:
            inner = part.inside(part.take("source"), part.name_of("source"))
            inner.drop("type")
            said = content_of(inner, "content", is_inner=True)
            self.unseen += said.unseen
            self._drop_media(part)
            return said.text
        return ""

    def _placeholder(self, part: Fields, what: str) -> str:
        self.unseen.append(Unseen(part.where, what))
        self._drop_media(part)
        return placeholder(what)

    @staticmethod
    def _drop_media(part: Fields) -> None:
        """Drop the fields that make up a picture or a document, which was reported already. Any other field of the part
        is reported as ignored.
        """
        for name in _MEDIA_FIELDS:
            if isinstance(part.peek(name), dict):
                part.inside(part.take(name), part.name_of(name)).drop(*_MEDIA_FIELDS)
        part.drop(*_MEDIA_FIELDS)


def result_of(fields: Fields, name: str, deferred: Mapping[str, Any] | None = None) -> Content:
    """A tool's result: a string, or parts.  deferred: tools that the result may refer to.  Raises:  as `content_of`."""
    content = Content(result_at=fields.name_of(name), deferred=deferred or {})
    return _read_content(content, fields, name, "")


def content_of(fields: Fields, name: str, default: Any = None, *, is_inner: bool = False) -> Content:
    """A string, or parts. is_inner: they are parts within a part, and cannot have parts themselves.

    Raises:  WrongField: neither, or a part of an unknown kind.
    """
    return _read_content(Content(is_inner=is_inner), fields, name, default)


def _read_content(content: Content, fields: Fields, name: str, default: Any) -> Content:
    value = fields.take(name, default)
    where = fields.name_of(name)
    if isinstance(value, str):
        content.add(value)
        return content
    if value is None:
        raise missing(where, "a string or a list of parts")
    if isinstance(value, dict):
        value = [value]  # Anthropic's tools may give one block as it is
    if not isinstance(value, list):
        raise wrong_type(where, "a string or a list of parts")
    for index, item in enumerate(value):
        if isinstance(item, str):
            content.add(item)
        else:
            content.add_part(fields.inside(item, f"{where}[{index}]"))
    return content


# `in_memory` means as long as the store has room, which is the default here too. `24h` means at least a day.
_RETENTIONS_S: Final[dict[str, float | None]] = {"in_memory": None, "in-memory": None, "24h": 86400.0}


def breakpoint_ttl(fields: Fields) -> float | None:
    """The lifetime that `cache_control` asks for, in seconds. An unknown kind of `cache_control` asks for no
    lifetime.
    """
    control = fields.child("cache_control")
    if control is None or not control.known("type", {"ephemeral": True}, False):
        return None
    return control.known("ttl", CACHE_TTLS_S, CACHE_TTLS_S["5m"])


def end_breakpoint(fields: Fields) -> tuple[TextBreakpoint, ...]:
    """A breakpoint at the end of the part that `fields` describes."""
    ttl_s = breakpoint_ttl(fields)
    return () if ttl_s is None else (TextBreakpoint(ttl_s=ttl_s),)


def retention_ttl(fields: Fields) -> float | None:
    """The time that OpenAI's `prompt_cache_retention` asks for: with "24h" the prompt is kept for a day."""
    return fields.known("prompt_cache_retention", _RETENTIONS_S, None)


def retained(messages: tuple[Message, ...], fields: Fields) -> tuple[Message, ...]:
    """The messages with a breakpoint at the end, which keeps the whole prompt as long as
    `prompt_cache_retention` says.
    """
    ttl_s = retention_ttl(fields)
    if ttl_s is None:
        return messages
    last = messages[-1]
    return (*messages[:-1], replace(last, breakpoints=(*last.breakpoints, TextBreakpoint(ttl_s=ttl_s))))


def end_conversation(messages: tuple[Message, ...], fields: Fields) -> tuple[Message, ...]:
    """The messages with the breakpoint that `cache_control` of the whole request asks for."""
    last = messages[-1]
    return (*messages[:-1], replace(last, breakpoints=(*last.breakpoints, *end_breakpoint(fields))))


class MessageList:
    """The messages of a conversation while they are read, and the media in them that the model cannot see."""

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self._unseen: list[tuple[int, Unseen]] = []

    def add(self, message: Message, unseen: list[Unseen] | None = None) -> None:
        self._unseen += [(len(self.messages), each) for each in unseen or ()]
        self.messages.append(message)

    def end_with(self, breakpoints: tuple[TextBreakpoint, ...]) -> None:
        """Add breakpoints at the end of the last message."""
        last = self.messages[-1]
        self.messages[-1] = replace(last, breakpoints=(*last.breakpoints, *breakpoints))

    def finish(self, notes: Notes) -> tuple[Message, ...]:
        """Raises:  WrongField: the newest user message has media that the model cannot see."""
        newest = self._newest_question()
        for index, unseen in self._unseen:
            if index == newest:
                raise unsupported(
                    unseen.path, f": this model reads text only, and the newest message asks about this {unseen.what}"
                )
            notes.leave_out(unseen.path, unseen.what)
        return tuple(self.messages)

    def _newest_question(self) -> int:
        """The index of the user message that is to be answered; -1 if there is none. A user message after a tool's
        result counts as part of the result: clients send screenshots in this way where their API has no other place,
        sometimes with system text before them.
        """
        turns = [(index, each.role) for index, each in enumerate(self.messages) if each.role is not ChatRole.SYSTEM]
        if len(turns) > 1 and turns[-1][1] is ChatRole.ASSISTANT:
            turns.pop()  # the last turn is the beginning of the answer
        since_answer = list(itertools.takewhile(lambda turn: turn[1] is not ChatRole.ASSISTANT, reversed(turns)))
        if not since_answer or since_answer[0][1] is not ChatRole.USER:
            return -1
        return -1 if any(role is ChatRole.TOOL for _, role in since_answer) else since_answer[0][0]


def _search_result(part: Fields) -> str:
    source, title = part.take("source", ""), part.take("title", "")
    part.drop("citations")
    text = content_of(part, "content", "", is_inner=True).text
    return "\n".join(str(each) for each in (title, source, text) if each)


def as_json(value: Any) -> str:
    """JSON text in the form of a call's arguments. The spacing is always the same, so that a resent value gives the
    same text.
    """
    return json.dumps(value, ensure_ascii=False)
