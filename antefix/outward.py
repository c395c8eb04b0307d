"""What of an error a caller from outside may read: what is wrong, never where it happened.

Messages between services name addresses, files and sockets, which is what an operator needs in a log. To a client they
are a map of the deployment.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator
from typing import Final

from antefix.errors import AntefixError, InvalidRequest

log = logging.getLogger("antefix.outward")

# URLs, addresses with or without a port, IPv6 in brackets, gRPC's forms of them, Unix sockets, and absolute paths.
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
    """The message, with each address and path in it taken out."""
    return _PLACES.sub(PLACE, message)


@contextlib.contextmanager
def outward() -> Iterator[None]:
    """An error that is raised inside goes out without places; the log has all of it.

    What is wrong with the request itself is said in its caller's own words, and stays as it is.
    """
    try:
        yield
    except AntefixError as err:
        told = str(err) if isinstance(err, InvalidRequest) else without_places(str(err))
        if told == str(err):
            raise
        log.warning("answered a caller with %s: %s", type(err).__name__, err)
        err.args = (told, *err.args[1:])
        raise
