"""Which roles may call which method: one row per method of every service. A method without a row in the table may be
called by nobody.

An open service (no TLS, no secret: docs/SECURITY.md, "One host") does not use this table.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from antefix.security.identity import Role


class GrantRule(StrEnum):
    """Whether a call needs a router's grant for a tenant."""

    NONE = "none"
    # A grant is checked if one is shown. The method itself asks for it where it needs one.
    OPTIONAL = "optional"
    NEEDED = "needed"


@dataclass(frozen=True, slots=True)
class Access:
    """One row: who may call a method, and whether the call needs a grant."""

    roles: frozenset[Role]
    grant: GrantRule = GrantRule.NONE


def _row(*roles: Role, grant: GrantRule = GrantRule.NONE) -> Access:
    return Access(frozenset(roles), grant)


_ROUTER, _OPERATOR, _LOCAL = Role.ROUTER, Role.OPERATOR, Role.LOCAL
_WORKERS: Final = (Role.PREFILL, Role.DECODE)
# The roles that write to and read from the store.
_FILLING: Final = (*_WORKERS, Role.ENGINE)
_CLIENTS: Final = (Role.FRONTEND, Role.TENANT, _OPERATOR, _LOCAL)
_EVERYBODY: Final = tuple(role for role in Role if role is not Role.NOBODY)
_GRANTED: Final = GrantRule.NEEDED
NO_ROW: Final = Access(frozenset())

TABLE: Final[dict[str, Access]] = {
    # Calls of applications. The caller's identity gives the tenant.
    "/antefix.v1.RouterService/Generate": _row(*_CLIENTS),
    "/antefix.v1.UsageService/Export": _row(*_CLIENTS),
    "/antefix.v1.UsageService/GetReceipt": _row(*_CLIENTS),
    # Its answer names workers' addresses.
    "/antefix.v1.RouterService/RouterStatus": _row(_OPERATOR, _LOCAL),
    # These answers name the addresses of engines' workers; explaining a request may read any tenant's data.
    "/antefix.v1.FleetService/FleetStatus": _row(_OPERATOR, _LOCAL),
    "/antefix.v1.FleetService/ExplainRequest": _row(_OPERATOR, _LOCAL),
    "/antefix.v1.RouterService/RegisterWorker": _row(*_WORKERS),
    # Work that a router has admitted and will bill.
    "/antefix.v1.PrefillService/Prefill": _row(_ROUTER, _OPERATOR, grant=_GRANTED),
    "/antefix.v1.DecodeService/Decode": _row(_ROUTER, _OPERATOR, grant=_GRANTED),
    "/antefix.v1.PrefillService/PrefillStatus": _row(_ROUTER, _OPERATOR),
    "/antefix.v1.DecodeService/DecodeStatus": _row(_ROUTER, _OPERATOR),
    "/antefix.v1.MemoryService/WatchMemory": _row(_ROUTER),
    "/antefix.v1.WindowService/WindowStatus": _row(_OPERATOR),
    "/antefix.v1.WindowService/SetStrategy": _row(_OPERATOR),
    # Calls on tenants' records.
    "/antefix.v1.KvStoreService/Lookup": _row(_ROUTER, *_FILLING, _OPERATOR, grant=_GRANTED),
    "/antefix.v1.KvStoreService/Fate": _row(_ROUTER, *_WORKERS, _OPERATOR, grant=_GRANTED),
    "/antefix.v1.KvStoreService/Get": _row(*_FILLING, _OPERATOR, grant=_GRANTED),
    # Operators copy records between stores: `antefix store copy`, `antefix drain`.
    "/antefix.v1.KvStoreService/Put": _row(*_FILLING, _OPERATOR, grant=_GRANTED),
    "/antefix.v1.KvStoreService/Pin": _row(_ROUTER, Role.ENGINE, _OPERATOR, grant=_GRANTED),
    "/antefix.v1.KvStoreService/Evict": _row(_ROUTER, Role.ENGINE, _OPERATOR, grant=_GRANTED),
    "/antefix.v1.KvStoreService/Purge": _row(_OPERATOR, grant=_GRANTED),
    # One call reports the uses of all tenants' records. Only reporting a record as forged needs a grant for its owner.
    "/antefix.v1.KvStoreService/Touch": _row(*_FILLING, grant=GrantRule.OPTIONAL),
    # Calls for no tenant. Watch reveals the names of all blocks, so only routers may call it.
    "/antefix.v1.KvStoreService/Register": _row(*_FILLING, _OPERATOR),
    "/antefix.v1.KvStoreService/Watch": _row(_ROUTER),
    # Lists names and owners of all records. Reading the records themselves needs a grant.
    "/antefix.v1.KvStoreService/Contents": _row(_OPERATOR),
    "/antefix.v1.KvStoreService/Stats": _row(_ROUTER, *_FILLING, _OPERATOR),
    # Methods of every service.
    "/antefix.v1.AboutService/About": _row(_ROUTER, _OPERATOR),
    "/grpc.health.v1.Health/Check": _row(*_EVERYBODY),
    "/grpc.health.v1.Health/List": _row(*_EVERYBODY),
    "/grpc.health.v1.Health/Watch": _row(*_EVERYBODY),
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": _row(_OPERATOR, _LOCAL),
}
