"""What this process shows to those it calls, wherever no other credentials are given: a process is one caller.

A process that has started a deployment (`antefix up`, tests) may know several, each for its own addresses.
"""

from __future__ import annotations

from antefix.security.credentials import Credentials

_by_address: dict[str, Credentials] = {}
_default: list[Credentials] = []


def use(credentials: Credentials | None) -> None:
    """From now on show this to everybody; None: show nothing."""
    _default[:] = [] if credentials is None else [credentials]


def use_for(address: str, credentials: Credentials) -> None:
    """Show this to whoever listens at the address."""
    _by_address[address] = credentials


def credentials_for(address: str) -> Credentials | None:
    """What to show there; None: nothing, and without TLS."""
    return _by_address.get(address) or (_default[0] if _default else None)
