"""The credentials that this process sends with its calls, unless a call is given others.

A process that has started a deployment (`antefix up`, tests) may have several credentials, each for certain addresses.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    # gRPC takes a while to import, and most commands make no calls.
    from antefix.security.credentials import Credentials

Find = Callable[[], "Credentials | None"]

_by_address: dict[str, Credentials] = {}
_own: list[Credentials | None] = [None]
_find: list[Find] = []


def use(credentials: Credentials | None) -> None:
    """Send these credentials with all of this process's calls from now on; None: send none."""
    _find.clear()
    _own[0] = credentials


def use_found(find: Find) -> None:
    """As `use`, but the credentials are whatever `find` returns at the first call."""
    _find[:] = [find]


def use_for(address: str, credentials: Credentials) -> None:
    """Send these credentials with calls to this address."""
    _by_address[address] = credentials


def credentials_for(address: str) -> Credentials | None:
    """The credentials for calls to this address; None: calls go there without credentials and without TLS."""
    if (known := _by_address.get(address)) is not None:
        return known
    if _find:
        use(_find[0]())
    return _own[0]
