"""Whose blocks they are, in one name: a tenant's, or those of one of its end users, who has a cache of its own.

Stores, block hashes and quotas know one name. It is `tenant`, or `tenant` + U+001F + `user`; people are shown both.
"""

from __future__ import annotations

from antefix.block import USER_SEPARATOR


def join_tenant(tenant: str, user: str) -> str:
    """The one name that block hashes are keyed with."""
    return f"{tenant}{USER_SEPARATOR}{user}" if user else tenant


def split_tenant(name: str) -> tuple[str, str]:
    """(tenant, user); the user is empty where the cache is the tenant's own."""
    tenant, _, user = name.partition(USER_SEPARATOR)
    return tenant, user
