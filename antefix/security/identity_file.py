"""identities.toml: roles for certificates that Antefix did not issue, and the tenants that front ends act for.

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

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from antefix.checked_files import read_toml
from antefix.checked_table import Table
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
    """The contents of the file. With an empty file, only names written by `antefix certs issue` are known."""

    listed: tuple[Listed, ...] = ()
    revoked: frozenset[str] = frozenset()

    def find(self, sans: Iterable[str]) -> tuple[Role, str, frozenset[str]] | None:
        """Role, name and tenants of a certificate with these SANs.

        Raises:  ConfigError: its SANs belong to different identities.
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
            raise ConfigError(f"the certificate matches several entries of identities.toml: {said}")
        return next(((role, name, tenants) for (role, name), tenants in found.items()), None)

    def is_revoked(self, sans: Iterable[str], serial: int) -> bool:
        return f"{serial:x}" in self.revoked or any(san in self.revoked for san in sans)


def load_identities(path: Path) -> IdentityFile:
    """Read the file; a missing file counts as empty.

    Raises:  ConfigError: the file does not parse, or a row is invalid.
    """
    if not path.exists() and not path.is_symlink():  # a link to nothing is a mistake: it would revoke nobody
        return IdentityFile()
    file = Table(read_toml(path, "identities"), str(path))
    rows = tuple(_row(table) for table in file.children("identity"))
    revoked = frozenset(name.lower() for name in file.texts("revoked", ()))
    file.close()
    return IdentityFile(listed=rows, revoked=revoked)


def _row(table: Table) -> Listed:
    name, role = table.text("name"), Role(table.one_of("role", tuple(ISSUED)))
    tenants = frozenset(table.texts("tenants", ()))
    table.close()
    if role is Role.TENANT and (len(tenants) != 1 or ALL_TENANTS in tenants):
        raise ConfigError(f"{table.where}: a tenant's certificate is for exactly one tenant: name it in tenants")
    if role not in (Role.TENANT, Role.FRONTEND) and tenants:
        raise ConfigError(f"{table.where}: role {role} acts for no tenants: only a frontend has a list")
    return Listed(name=name, role=role, tenants=tenants)
