"""Removes addresses and paths from error messages that go to outside callers.

Messages between services name addresses, files and sockets, because operators need them in logs. A client could learn
the structure of the deployment from them.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator
from typing import Final

from antefix.errors import AntefixError, InvalidRequest

log = logging.getLogger("antefix.outward")

# Matches URLs, addresses with or without a port, IPv6 in brackets, gRPC's address forms, Unix sockets, absolute paths.
_PLACES: Final = re.compile(
    r"""
    \b[a-z][a-z0-9+.-]*://[^\s'",;)]+
    | \b(?:ipv4|ipv6|unix|dns|unix-abstract):[^\s'",;)]+
    | \[[0-9A-Fa-f:.%]{2,}\](?::\d+)?
    | (?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?::\d{1,5})?(?![\w.])
    | (?<![\w:.])(?=[\w.-]*[A-Za-z])(?:[A-Za-z0-9_](?:[\w-]*\w)?\.)*[A-Za-z0-9_](?:[\w-]*\w)?:\d{2,5}\b
    | (?<![\w/.])/(?:[\w.+@-]+/)+[\w.+@-]*
    """,
    re.VERBOSE,
)
PLACE: Final = "(a service)"


def without_places(message: str) -> str:
    """The message, with each address and path replaced by PLACE."""
    return _PLACES.sub(PLACE, message)


@contextlib.contextmanager
def outward() -> Iterator[None]:
    """A context that removes addresses and paths from errors raised inside, and logs the full message.

    An InvalidRequest keeps its message, which names only parts of the caller's own request.
    """
    try:
        yield
    except AntefixError as err:
        told = str(err) if isinstance(err, InvalidRequest) else without_places(str(err))
        if told == str(err):
            raise
        log.warning("a caller got an answer with less detail than this error has: %s: %s", type(err).__name__, err)
        err.args = (told, *err.args[1:])
        raise
