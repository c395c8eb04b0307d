"""Identifies a gRPC caller by its API key."""

from __future__ import annotations

from antefix.security.identity import ALL_TENANTS, Identity, Role
from antefix_billing.api_keys import Scope
from antefix_billing.key_register import KeyRegister


def caller_of_key(keys: KeyRegister, key: str, method: str) -> Identity | None:
    """The identity of the caller with this API key; None if no key is needed.

    Raises:  Unauthenticated: the key is unknown, expired or revoked.  PermissionDenied: it lacks the scope of this
    method.
    """
    if keys.open_as is not None:
        return None
    scope = Scope.USAGE if method.startswith("/antefix.v1.UsageService/") else Scope.GENERATE
    # Health and reflection reveal nothing about tenants, so any key is accepted.
    holder = keys.authenticate(key, scope if method.startswith("/antefix.") else None)
    if scope is Scope.USAGE and Scope.ADMIN in holder.scopes:
        # For this call, the caller counts as a front end that may act for all tenants.
        return Identity(role=Role.FRONTEND, name=holder.key_id, tenants=frozenset({ALL_TENANTS}))
    return Identity(role=Role.TENANT, name=holder.tenant, tenants=frozenset({holder.tenant}), key_id=holder.key_id)
