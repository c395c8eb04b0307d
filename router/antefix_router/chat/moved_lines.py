"""Moves changing lines of the system text to a later place, because no prefix can be hit beyond the first change. Pure.

For example, some clients begin their system text with a line about themselves: a version, a checksum, a billing
account. Such a line differs in every session or every request, and everything after it would miss. A table of rules
recognises these lines. No text is dropped. A line that changes with the session moves to the beginning of the first
user message. A line that changes with the request moves to the end of the last user message (`messages.Aside`). The old
and the new place come after system text and tools. The prompt always is the text with the lines moved, both for hits
and for misses. Operators can add rules in a file (deploy/prefix_rules.toml).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Final

from antefix.checked_files import read_toml
from antefix.checked_table import Table
from antefix.config import require
from antefix.errors import ConfigError
from antefix_router.chat.messages import ChatRole, Conversation, Message, TextBreakpoint

OFF: Final = "off"
_NAME: Final = re.compile(r"[a-z0-9-]{1,64}")
# A rule applies to short lines. A longer one is text that happens to have no line breaks.
_LINE_CHARACTERS_MAX: Final = 2000


class Changes(StrEnum):
    """How often a line changes. The kind of change decides where the line is moved."""

    SESSION = "session"
    REQUEST = "request"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """line: a regular expression that matches from the line's start.  anywhere: look at all lines of the system text;
    otherwise only where a part begins.
    """

    name: str
    line: re.Pattern[str]
    changes: Changes
    anywhere: bool = False


# The first matching rule counts. Claude Code writes this header since 2.1.36; `cch` is a checksum of the whole request.
SHIPPED: Final = (
    Rule(
        name="anthropic-billing-checksum",
        line=re.compile(r"x-anthropic-billing-header:.*\bcch="),
        changes=Changes.REQUEST,
    ),
    Rule(name="anthropic-billing", line=re.compile("x-anthropic-billing-header:"), changes=Changes.SESSION),
    Rule(name="anthropic-header", line=re.compile("x-anthropic-[a-z0-9-]+:"), changes=Changes.REQUEST),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Moved:
    """A line that was moved, with the rule that matched it."""

    rule: Rule
    text: str


def move_lines(conversation: Conversation, rules: Sequence[Rule]) -> tuple[Conversation, list[Moved]]:
    """Move the lines that the rules match. Returns the conversation after the move, and the moved lines."""
    if not rules:
        return conversation, []
    head: list[Message] = []
    moved: list[Moved] = []
    rest = 0
    for message in conversation.messages:
        if message.role is not ChatRole.SYSTEM:
            break
        kept = _without_lines(message, rules, moved)
        head += [kept] if kept.content or not message.content else []
        rest += 1
    if not moved:
        return conversation, []
    said = {each: "\n".join(one.text for one in moved if one.rule.changes is each) for each in Changes}
    first = [Message(role=ChatRole.USER, content=said[Changes.SESSION])] if said[Changes.SESSION] else []
    messages = (*head, *first, *conversation.messages[rest:])
    return replace(conversation, messages=messages, aside=said[Changes.REQUEST]), moved


@dataclass(slots=True)
class _Text:
    """A message's text while lines are removed from it.  cuts: (offset, number of characters) of each removal."""

    kept: str = ""
    cuts: list[tuple[int, int]] = field(default_factory=list)

    def place(self, offset: int) -> int:
        """The position that the text at this offset has at present."""
        return offset - sum(min(size, offset - start) for start, size in self.cuts if start < offset)


def _without_lines(message: Message, rules: Sequence[Rule], moved: list[Moved]) -> Message:
    text, starts = _Text(), sorted({0, *message.part_starts})
    for start, end in zip(starts, [*starts[1:], len(message.content)], strict=True):
        at, is_head = start, True
        for line in message.content[start:end].splitlines(keepends=True):
            rule = _rule_of(line, rules, is_head=is_head)
            if rule is not None:
                moved.append(Moved(rule=rule, text=line.rstrip("\r\n")))
                text.cuts.append((at, len(line)))
            else:
                is_head = False
                text.kept += line
            at += len(line)
    if not text.cuts:
        return message
    breakpoints = tuple(
        each if each.offset is None else TextBreakpoint(ttl_s=each.ttl_s, offset=text.place(each.offset))
        for each in message.breakpoints
        # A breakpoint with nothing but moved lines before it would keep nothing.
        if each.offset is None or text.place(each.offset) > 0
    )
    return replace(message, content=text.kept, breakpoints=breakpoints, part_starts=())


def _rule_of(line: str, rules: Sequence[Rule], *, is_head: bool) -> Rule | None:
    if len(line) > _LINE_CHARACTERS_MAX:
        return None
    return next((rule for rule in rules if (is_head or rule.anywhere) and rule.line.match(line)), None)


def load_rules(setting: str) -> tuple[Rule, ...]:
    """The shipped rules, preceded by those of a file if one is named. If the setting is `off`, there are no rules.

    A file has `[[rule]]` tables with `name`, `line` (a regular expression), `changes` and optionally `anywhere`. A rule
    replaces the shipped rule of the same name; `shipped = false` leaves out all shipped rules.
    Raises:  ConfigError: the file cannot be read or has another format.
    """
    if setting in ("", OFF):
        return SHIPPED if not setting else ()
    where = f"prefix rules {setting}"
    file = Table(read_toml(setting, "prefix rules"), where)
    with_shipped = file.boolean("shipped", True)
    rules = [_rule(table) for table in file.children("rule")]
    file.close()
    names = [rule.name for rule in rules]
    require(len(set(names)) == len(names), f"{where}: two rules have one name")
    shipped = [rule for rule in SHIPPED if with_shipped and rule.name not in names]
    return (*rules, *shipped)


def _rule(table: Table) -> Rule:
    name, line = table.text("name"), table.text("line")
    changes = Changes(table.one_of("changes", tuple(Changes)))
    anywhere = table.boolean("anywhere", False)
    table.close()
    require(bool(_NAME.fullmatch(name)), f"{table.where} needs a name of a-z, 0-9 and -")
    try:
        pattern = re.compile(line)
        matches_all = pattern.match("") is not None
    except (re.error, RecursionError, OverflowError) as err:
        raise ConfigError(f"{table.where}: {line!r:.200} is not a valid regular expression: {err}") from err
    require(not matches_all, f"{table.where}: {line!r:.200} matches every line")
    return Rule(name=name, line=pattern, changes=changes, anywhere=anywhere)
