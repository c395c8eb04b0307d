"""Who a caller is: one role and one name, read from its certificate, or from what it shows with a call.

    spiffe://TRUST-DOMAIN/ROLE/NAME          what `antefix certs issue` writes into a certificate
    NAME.ROLE.antefix.internal               the same as a host name, which gRPC's clients check

Names of other forms (cert-manager's, another SPIFFE domain's) get their role from a file: `identity_file.py`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from antefix.errors import PermissionDenied

DOMAIN: Final = "antefix.internal"
ALL_TENANTS: Final = "*"
# A label of a host name, so that a name fits both forms.
NAME: Final = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")


class Role(StrEnum):
    """The kind of a caller.

    LOCAL: a process on this host without credentials, where there is no TLS.  NOBODY: any other caller without
    credentials.
    """

    ROUTER = "router"
    PREFILL = "prefill"
    DECODE = "decode"
    KVSTORE = "kvstore"
    # An external engine, such as vLLM, that keeps its KV in the store for the one tenant of its grant.
    ENGINE = "engine"
    # A program that users log in to: it acts for the tenants that are listed for it.
    FRONTEND = "frontend"
    TENANT = "tenant"
    OPERATOR = "operator"
    # Scrapes metrics, and nothing else.
    METRICS = "metrics"
    LOCAL = "local"
    NOBODY = "nobody"


# Certificates can be issued for these roles. The other two are callers without a certificate.
ISSUED: Final = tuple(role for role in Role if role not in (Role.LOCAL, Role.NOBODY))


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """A caller.  tenants: the tenants that it may act for; "*" means all.  hosts: the host names in its certificate.

    expires_s: Unix time at which the caller's certificate expires; infinite without a certificate. key_id: the id of
    its API key.
    """

    role: Role
    name: str = ""
    tenants: frozenset[str] = frozenset()
    hosts: frozenset[str] = frozenset()
    expires_s: float = float("inf")
    key_id: str = ""
    # Whether the identity was proved by a certificate, a token or the deployment's secret.
    proved: bool = True

    def __str__(self) -> str:
        return f"{self.role} {self.name}" if self.name else str(self.role)

    def tenant(self, asked: str) -> str:
        """The tenant that a call is for: a tenant's own, or the one that a front end asks for.

        Raises:  PermissionDenied: the caller may not act for that tenant.
        """
        if self.role is Role.TENANT:
            own = next(iter(self.tenants), "")
            if asked not in ("", own):
                raise PermissionDenied(f"{self} may not act for tenant {asked!r}: leave the tenant field empty")
            return own
        if ALL_TENANTS in self.tenants or asked in self.tenants:
            return asked
        listed = "none is" if not self.tenants else f"only {', '.join(sorted(self.tenants))} are"
        raise PermissionDenied(f"{self} may not act for tenant {asked!r}: {listed} listed for this caller")


LOCAL: Final = Identity(role=Role.LOCAL, tenants=frozenset({ALL_TENANTS}), proved=False)
NOBODY: Final = Identity(role=Role.NOBODY, proved=False)


def role_host(role: Role, name: str = "") -> str:
    """The host name that stands for a role, or for one of its processes, in certificates that Antefix issues."""
    return f"{name}.{role}.{DOMAIN}" if name else f"{role}.{DOMAIN}"


def named_identity(name: str) -> tuple[Role, str] | None:
    """The role and name in a SAN that Antefix wrote; None for any other SAN."""
    if name.startswith("spiffe://"):
        domain, _, path = name.removeprefix("spiffe://").partition("/")
        role, _, rest = path.partition("/")
        return (Role(role), rest) if domain == DOMAIN and role in ISSUED and rest else None
    parts = name.removesuffix(f".{DOMAIN}").split(".")
    is_ours = name.endswith(f".{DOMAIN}") and len(parts) == 2 and parts[1] in ISSUED
    return (Role(parts[1]), parts[0]) if is_ours else None
