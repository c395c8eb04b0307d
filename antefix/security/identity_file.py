"""identities.toml: roles of certificates that carry other names than ours, and the tenants that front ends act for.

[[identity]]
name = "spiffe://cluster.local/ns/antefix/sa/prefill"     # a SAN, URI or DNS; a * at its end stands for any rest
role = "prefill"

[[identity]]
name = "spiffe://antefix.internal/frontend/web"
role = "frontend"
tenants = ["acme", "globex"]                              # "*" for all

revoked = ["spiffe://antefix.internal/prefill/p3"]        # names, or serial numbers in hex
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from antefix.errors import ConfigError
from antefix.security.identity import ALL_TENANTS, ISSUED, Role, named_identity

FILE: Final = "identities.toml"


@dataclass(frozen=True, slots=True, kw_only=True)
class Listed:
    """One row of the file."""

    name: str
    role: Role
    tenants: frozenset[str]

    def fits(self, san: str) -> bool:
        return san.startswith(self.name[:-1]) if self.name.endswith("*") else san == self.name


@dataclass(frozen=True, slots=True, kw_only=True)
class IdentityFile:
    """What the file says. An empty one leaves the names that `antefix certs issue` writes."""

    listed: tuple[Listed, ...] = ()
    revoked: frozenset[str] = frozenset()

    def find(self, sans: Iterable[str]) -> tuple[Role, str, frozenset[str]] | None:
        """Role, name and tenants of a certificate with these SANs.

        Raises:  ConfigError: its SANs say different things.
        """
        found: dict[tuple[Role, str], frozenset[str]] = {}
        for san in sans:
            for row in self.listed:
                if row.fits(san):
                    own = named_identity(san)
                    found[row.role, own[1] if own else san] = row.tenants
            if (own := named_identity(san)) is not None:
                found.setdefault(own, frozenset({own[1]}) if own[0] is Role.TENANT else frozenset())
        if len({role for role, _ in found}) > 1 or len(found) > 1:
            said = ", ".join(f"{role} {name}" for role, name in sorted(found))
            raise ConfigError(f"the certificate stands for several identities: {said}")
        return next(((role, name, tenants) for (role, name), tenants in found.items()), None)

    def is_revoked(self, sans: Iterable[str], serial: int) -> bool:
        return f"{serial:x}" in self.revoked or any(san in self.revoked for san in sans)


def load_identities(path: Path) -> IdentityFile:
    """Without the file: an empty one.  Raises:  ConfigError: it does not parse, or a row makes no sense."""
    try:
        tables = tomllib.loads(path.read_text())
    except FileNotFoundError:
        return IdentityFile()
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as err:
        raise ConfigError(f"{path}: {err}") from err
    try:
        rows = tuple(_row(table) for table in tables.pop("identity", []))
        revoked = frozenset(str(name).lower() for name in tables.pop("revoked", []))
    except (KeyError, TypeError, ValueError) as err:
        raise ConfigError(f"{path}: each [[identity]] needs a name and a role of {', '.join(ISSUED)}: {err}") from err
    if tables:
        raise ConfigError(f"{path}: unknown names: {', '.join(sorted(tables))}")
    return IdentityFile(listed=rows, revoked=revoked)


def _row(table: dict[str, Any]) -> Listed:
    unknown = set(table) - {"name", "role", "tenants"}
    if unknown:
        raise ValueError(f"unknown names: {', '.join(sorted(unknown))}")
    role = Role(table["role"])
    if role not in ISSUED:
        raise ValueError(f"role {role} is no caller's with a certificate")
    given = table.get("tenants", [])
    if not isinstance(given, list):
        raise TypeError(f"tenants must be a list of names, is {given!r}")
    tenants = frozenset(map(str, given))
    if role is Role.TENANT and (len(tenants) != 1 or ALL_TENANTS in tenants):
        raise ValueError("a tenant's certificate is for one tenant: name it in tenants")
    if role not in (Role.TENANT, Role.FRONTEND) and tenants:
        raise ValueError(f"role {role} acts for no tenants: only a frontend has a list")
    return Listed(name=str(table["name"]), role=role, tenants=tenants)
