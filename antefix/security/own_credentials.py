"""What this process shows to those it calls, wherever no other credentials are given: a process is one caller.

A process that has started a deployment (`antefix up`, tests) may know several, each for its own addresses.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    # gRPC takes a while to import, and most commands call nobody.
    from antefix.security.credentials import Credentials

Find = Callable[[], "Credentials | None"]

_by_address: dict[str, Credentials] = {}
_own: list[Credentials | None] = [None]
_find: list[Find] = []


def use(credentials: Credentials | None) -> None:
    """From now on show this to everybody; None: show nothing."""
    _find.clear()
    _own[0] = credentials


def use_found(find: Find) -> None:
    """The same, looked for when somebody is called."""
    _find[:] = [find]


def use_for(address: str, credentials: Credentials) -> None:
    """Show this to the process that listens at the address."""
    _by_address[address] = credentials


def credentials_for(address: str) -> Credentials | None:
    """What to show there; None: nothing, and without TLS."""
    if (known := _by_address.get(address)) is not None:
        return known
    if _find:
        use(_find[0]())
    return _own[0]
