"""The name of a cache's owner: a tenant, or one of a tenant's end users, whose cache is separate from the tenant's.

Stores, block hashes and quotas name the owner of a cache alike: `tenant`, or `tenant` + U+001F + `user`. People are
shown both parts.
"""

from __future__ import annotations

from antefix.block import USER_SEPARATOR


def join_tenant(tenant: str, user: str) -> str:
    """The joint name of tenant and user, with which block hashes are keyed."""
    return f"{tenant}{USER_SEPARATOR}{user}" if user else tenant


def split_tenant(name: str) -> tuple[str, str]:
    """(tenant, user). The user is empty if all users of the tenant share one cache."""
    tenant, _, user = name.partition(USER_SEPARATOR)
    return tenant, user
