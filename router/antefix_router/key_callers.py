"""Who a gRPC caller with an API key is."""

from __future__ import annotations

from antefix.security.identity import ALL_TENANTS, Identity, Role
from antefix_billing.api_keys import Scope
from antefix_billing.key_register import KeyRegister


def caller_of_key(keys: KeyRegister, key: str, method: str) -> Identity | None:
    """Who shows this API key; None where nobody needs one.

    Raises:  Unauthenticated: it is not known, or over.  PermissionDenied: it lacks the scope of this method.
    """
    if keys.open_as is not None:
        return None
    scope = Scope.USAGE if method.startswith("/antefix.v1.UsageService/") else Scope.GENERATE
    # Health and reflection say nothing of tenants: any key will do.
    holder = keys.authenticate(key, scope if method.startswith("/antefix.") else None)
    if scope is Scope.USAGE and Scope.ADMIN in holder.scopes:
        # For this call, like a front end for which all tenants are listed.
        return Identity(role=Role.FRONTEND, name=holder.key_id, tenants=frozenset({ALL_TENANTS}))
    return Identity(role=Role.TENANT, name=holder.tenant, tenants=frozenset({holder.tenant}), key_id=holder.key_id)
