"""How events of one kind are written into Redis Streams. Apart from `redis_stream`, so that formats need no client.

Every entry has `a` (the source's name), `e` (epoch), `n` (number) and `k` (kind, 0: the source is alive); a format adds
its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

from antefix.events.block_events import EventKind

E = TypeVar("E")
Fields = dict[str, str | int | bytes]

# How often a source that has no news says that it is alive, with this for a kind.
ALIVE_S: Final = 2.0
ALIVE: Final = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamFormat(Generic[E]):
    """stream_of: where a source's events go.  unpack: raises KeyError or ValueError for what is no such event."""

    stream_of: Callable[[str], str]
    pack: Callable[[E], Fields]
    unpack: Callable[[Mapping[bytes, bytes]], E]


def known_kind(fields: Mapping[bytes, bytes]) -> EventKind:
    """Raises:  KeyError, ValueError: none that we know. Anybody may write into Redis, so it is not counted as one."""
    kind = EventKind(int(fields[b"k"]))
    if kind is EventKind.UNKNOWN:
        raise ValueError("not a kind of event")
    return kind
