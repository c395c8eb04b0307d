"""Lines of the system text that change, moved behind what stays: a prefix that changes is never hit again. Pure.

Some clients begin their system text with a line about themselves: a version, a checksum, whom to bill. It is different
in every session or in every request, and everything behind it would miss. A table of rules says which lines these are.
Nothing is dropped: what changes with a session is what a user says first, what changes with a request is what a user
says last (`messages.Aside`); both are behind system text and tools. The prompt is what is rendered then, for hit and
miss alike. Operators add rules of their own in a file (deploy/prefix_rules.toml).
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
# A rule is for lines; what is longer is text that happens to have no line breaks.
_LINE_CHARACTERS_MAX: Final = 2000


class Changes(StrEnum):
    """How often a line changes, and so where it does least harm."""

    SESSION = "session"
    REQUEST = "request"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """line: matches from the line's start.  anywhere: in all of the system text; else only where a part begins."""

    name: str
    line: re.Pattern[str]
    changes: Changes
    anywhere: bool = False


# The first that matches counts. Claude Code writes its header since 2.1.36; `cch` is a checksum of the whole request.
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
    """A line that was moved, and by which rule."""

    rule: Rule
    text: str


def move_lines(conversation: Conversation, rules: Sequence[Rule]) -> tuple[Conversation, list[Moved]]:
    """The conversation with what the rules match moved, and what that was."""
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
    """A message's text while lines are taken out of it. cuts: (where, how many characters) that were taken out."""

    kept: str = ""
    cuts: list[tuple[int, int]] = field(default_factory=list)

    def place(self, offset: int) -> int:
        """Where what stood at this offset stands now."""
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
        # A breakpoint behind nothing but moved lines would keep nothing.
        if each.offset is None or text.place(each.offset) > 0
    )
    return replace(message, content=text.kept, breakpoints=breakpoints, part_starts=())


def _rule_of(line: str, rules: Sequence[Rule], *, is_head: bool) -> Rule | None:
    if len(line) > _LINE_CHARACTERS_MAX:
        return None
    return next((rule for rule in rules if (is_head or rule.anywhere) and rule.line.match(line)), None)


def load_rules(setting: str) -> tuple[Rule, ...]:
    """The shipped rules; before them those of a file, if one is named; none where the setting is `off`.

    A file has `[[rule]]` tables with `name`, `line` (a regular expression), `changes` and, if wanted, `anywhere`. A
    rule takes the place of a shipped one of its name; `shipped = false` leaves all of those out.
    Raises:  ConfigError: it cannot be read, or is of another form.
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
        raise ConfigError(f"{table.where}: {line!r:.200} is no regular expression: {err}") from err
    require(not matches_all, f"{table.where}: {line!r:.200} matches every line")
    return Rule(name=name, line=pattern, changes=changes, anywhere=anywhere)
