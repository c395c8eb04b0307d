"""Separates a request's end user from a session that the client wrote into the same name. The module has no state; it
uses a table of known forms.

Each end user has a separate cache. If a user's name changed with every session, each session would have its own cache.
So the stable part of the name is the user, and the session is a placement hint like `prompt_cache_key`. A name in an
unknown form is used as a whole, because removing anything but a known session could let different users share a cache.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

# Longer names are refused later, so they are not examined here.
_CHARACTERS_MAX: Final = 4096
_SESSION_BYTES_MAX: Final = 512
# Members of a JSON name. A name without any member of the first list has no user to whom the session could belong.
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
    """user: the user whose cache is used. session: the user's conversation, or empty. shape: the row of the table that
    matched.
    """

    user: str
    session: str = ""
    shape: str = ""


def split_user(name: str) -> UserName:
    """The stable part and the session in a name of a known form. A name of any other form is returned unchanged."""
    if len(name) <= _CHARACTERS_MAX:
        for shape, split in SHAPES.items():
            found = split(name)
            if found is not None and found[0]:
                user, session = found
                # The session is only a hint, so it is never a reason to refuse a request.
                is_usable = len(session.encode()) <= _SESSION_BYTES_MAX
                return UserName(user=user, session=session if is_usable else "", shape=shape)
    return UserName(user=name)


def _json_name(name: str) -> tuple[str, str] | None:
    """Split a name that is a JSON object of texts. The user is all members except the session's, in a fixed order,
    whatever order the client used.
    """
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
        (stable + session).encode()  # escapes can stand for surrogates, which are not valid text
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


# The client that sends a form -> the function that splits it. The first form that matches counts.
SHAPES: Final[dict[str, Callable[[str], tuple[str, str] | None]]] = {
    # {"device_id": "...", "account_uuid": "...", "session_id": "..."}, and similar names by other agents
    "json": _json_name,
    # user_<64 hex>_account_<uuid, or nothing>_session_<uuid>: Claude Code before it wrote JSON
    "claude-code-1": _pattern(f"(?P<user>user_[0-9a-fA-F]+_account_(?:{_UUID})?)_session_(?P<session>{_UUID})"),
    # The same form from clients that name no account: user_<hash>_session_<uuid>
    "user-session": _pattern(f"(?P<user>user_[0-9a-fA-F]{{16,}})_+session_(?P<session>{_UUID})"),
}
