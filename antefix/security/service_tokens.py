"""Tokens with which processes of one host prove their role without certificates, made from the deployment's secret.

The secret itself is never sent. A token contains a role, the time, and a MAC over both of them and the method. The
token is valid for this method and for one minute, so a process that listens in place of a dead one gets no lasting
credentials.
"""

from __future__ import annotations

import time
from typing import Final

from antefix.errors import Unauthenticated
from antefix.secret import Keyring
from antefix.security.identity import ALL_TENANTS, ISSUED, Identity, Role

CALLER_KEY: Final = "antefix-caller"
AGE_S_MAX: Final = 60.0
# Roles whose processes or operators may read the deployment's secret.
PROVABLE: Final = frozenset(ISSUED) - {Role.TENANT, Role.FRONTEND}


def service_token(keyring: Keyring, role: Role, method: str) -> str:
    """The token for a call of this method ("/antefix.v1.RouterService/RouterStatus")."""
    said_at_ms = round(1000 * time.time())
    return f"{role} {said_at_ms} {keyring.proof(*_parts(role, said_at_ms, method)).hex()}"


def check_service_token(keyring: Keyring, token: str, method: str) -> Identity:
    """The token's identity.

    Raises:  Unauthenticated: it was not made with the deployment's secret for this method within the last minute.
    """
    try:
        name, said, proof = token.split(" ")
        role, said_at_ms, given = Role(name), int(said), bytes.fromhex(proof)
    except ValueError as err:
        raise Unauthenticated("the service token is malformed") from err
    if role not in PROVABLE or not keyring.proves(given, *_parts(role, said_at_ms, method)):
        raise Unauthenticated("the service token was not made with this deployment's secret for this call")
    if abs(time.time() - said_at_ms / 1000) > AGE_S_MAX:
        raise Unauthenticated(
            f"the service token is more than {AGE_S_MAX:g} s old, or the two hosts' clocks differ by more than that"
        )
    return Identity(role=role, tenants=frozenset({ALL_TENANTS}) if role is Role.OPERATOR else frozenset())


def _parts(role: Role, said_at_ms: int, method: str) -> tuple[bytes, ...]:
    return (b"service", role.encode(), str(said_at_ms).encode(), method.encode())
