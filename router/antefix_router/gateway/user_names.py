"""Who a request's end user is, where clients write a session into the same name. Pure; a table of known shapes.

A user has a cache of its own. A name that changes with every session would give each session its own, so the part that
stays names the user, and the session is a hint where to place the request, like `prompt_cache_key`. What matches no
shape is taken whole: only what is known to be a session may ever be taken off, or users would share what they must not.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

# Longer names are refused anyway, and nothing of a name that long is worth reading.
_CHARACTERS_MAX: Final = 4096
_SESSION_BYTES_MAX: Final = 512
# Members of a JSON name. Without one of the first there is nobody whose sessions they could be.
_STABLE: Final = (
    *("device_id", "account_uuid", "account_id", "user_id", "user_uuid", "user", "email", "organization_uuid"),
    *("deviceId", "accountUuid", "accountId", "userId", "organizationId", "organization_id"),
)
_SESSIONS: Final = (
    *("session_id", "session_uuid", "session", "conversation_id", "thread_id", "chat_id", "run_id"),
    *("sessionId", "conversationId", "threadId", "chatId", "runId"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class UserName:
    """user: whose cache it is.  session: which conversation of theirs, or empty.  shape: which row of the table."""

    user: str
    session: str = ""
    shape: str = ""


def split_user(name: str) -> UserName:
    """The stable part and the session of a name in a known shape; any other name as it is."""
    if len(name) <= _CHARACTERS_MAX:
        for shape, split in SHAPES.items():
            found = split(name)
            if found is not None and found[0]:
                user, session = found
                # A hint is never a reason to refuse a request.
                is_usable = len(session.encode()) <= _SESSION_BYTES_MAX
                return UserName(user=user, session=session if is_usable else "", shape=shape)
    return UserName(user=name)


def _json_name(name: str) -> tuple[str, str] | None:
    """A JSON object of text: all members but the session's, in one order, whatever order the client wrote them in."""
    if not name.startswith("{"):
        return None
    try:
        members: Any = json.loads(name)
        sessions = [key for key in _SESSIONS if key in members]
        if not sessions or not any(members.get(key) for key in _STABLE):
            return None
        values = [members.pop(key) for key in sessions]
        if not all(isinstance(value, str) for value in values):
            return None
        stable = json.dumps(members, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
        session = "/".join(value for value in values if value)
        (stable + session).encode()  # escapes can stand for what is no text
    except (ValueError, RecursionError, TypeError, AttributeError):
        return None
    return stable, session


_UUID: Final = "[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}"


def _pattern(text: str) -> Callable[[str], tuple[str, str] | None]:
    pattern = re.compile(text)

    def split(name: str) -> tuple[str, str] | None:
        match = pattern.fullmatch(name)
        return None if match is None else (match["user"], match["session"])

    return split


# Who sends it -> how it is taken apart. The first that fits counts.
SHAPES: Final[dict[str, Callable[[str], tuple[str, str] | None]]] = {
    # {"device_id": "...", "account_uuid": "...", "session_id": "..."}, and what other agents write alike
    "json": _json_name,
    # user_<64 hex>_account_<uuid, or nothing>_session_<uuid>: Claude Code before it wrote JSON
    "claude-code-1": _pattern(f"(?P<user>user_[0-9a-fA-F]+_account_(?:{_UUID})?)_session_(?P<session>{_UUID})"),
    # The same of clients that name no account: user_<hash>_session_<uuid>
    "user-session": _pattern(f"(?P<user>user_[0-9a-fA-F]{{16,}})_+session_(?P<session>{_UUID})"),
}
