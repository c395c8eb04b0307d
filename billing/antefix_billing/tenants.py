"""Tenants, read from TOML: the API keys of each, and its limits. Of an API key, only its SHA-256 is stored.

    keys = "needed"                             # or "none": no key is needed, and only the limits apply

    [[tenant]] name = "acme" api_key_sha256 = ["<64 hex digits>"]        # printf %s "$KEY" | sha256sum requests = 8
    # at the same time share = 2                                   # weight on busy workers; a tenant without a share
    has 1 limit = [{ window = "day", tokens = 5000000, money = "2.50" }]

A tenant named "*" holds the limits of all tenants that are not named. Keys that are created and revoked at run time are
in a separate file (`api_keys`). A file without any key is refused unless it has `keys = "none"`, because it would let
everybody in.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from antefix.checked_files import read_toml
from antefix.checked_table import Table
from antefix.errors import ConfigError
from antefix.private_file import refuse_writable
from antefix_billing.api_keys import check_digest
from antefix_billing.limits import Limit, LimitWindow, TenantLimits
from antefix_billing.ratecard import PRICE_DIGITS_MAX

# The largest budget. It is more than any tenant will pay, and sums of it are exact.
MONEY_MAX: Final = 10**15
# The longest tenant name, as in the proto files.
SHARE_MAX: Final = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantBook:
    """keys: tenants by the SHA-256 of their API keys.  needs_keys: False only if the file says so, or if there is no
    file.
    """

    keys: dict[bytes, str] = field(default_factory=dict)
    limits: dict[str, TenantLimits] = field(default_factory=dict)
    default: TenantLimits = field(default_factory=TenantLimits)
    needs_keys: bool = False


def load_tenants(path: str | Path, *, has_other_keys: bool = False) -> TenantBook:
    """has_other_keys: a file of API keys exists as well, so this file need not have any.

    Raises:  ConfigError: the file does not parse, a setting is invalid, or the file would let everybody in.
    """
    refuse_writable(path, "tenants file")
    file = Table(read_toml(path, "tenants file"), f"tenants file {path}")
    asked = file.one_of("keys", ("needed", "none"), "needed")
    keys: dict[bytes, str] = {}
    limits: dict[str, TenantLimits] = {}
    for table in file.children("tenant"):
        name = table.text("name", empty=True)
        for key in table.texts("api_key_sha256", ()):
            digest = _digest(table, key)
            if digest in keys:
                raise ConfigError(f"{table.where}: the SHA-256 of an API key is given twice")
            if name in ("", "*"):
                raise ConfigError(
                    f"{table.where}: the name {name!r} stands for no single tenant, so it can have no key"
                )
            keys[digest] = name
        if name in limits:
            raise ConfigError(f"{table.where}: {name} is there twice")
        limits[name] = _limits(table)
    file.close()
    if asked == "none" and (keys or has_other_keys):
        raise ConfigError(f'{file.where}: the file says keys = "none", but there are keys in it')
    if asked == "needed" and not keys and not has_other_keys:
        raise ConfigError(
            f"{file.where}: the file has no API key, so everybody could call: add api_key_sha256, give"
            ' --api-keys-file, or say keys = "none"'
        )
    default = limits.pop("*", TenantLimits())
    return TenantBook(keys=keys, limits=limits, default=default, needs_keys=asked == "needed")


def _digest(table: Table, key: str) -> bytes:
    try:
        digest = bytes.fromhex(key)
    except ValueError as err:
        raise table.wrong("api_key_sha256", "a list of SHA-256, each of 64 hex digits", key) from err
    check_digest(digest, table.where)
    return digest


def _limits(table: Table) -> TenantLimits:
    limits = []
    for row in table.children("limit"):
        limit = Limit(
            window=LimitWindow(row.one_of("window", tuple(LimitWindow))),
            tokens=row.integer("tokens"),
            requests=row.integer("requests"),
            money=row.decimal("money", below=MONEY_MAX, decimals=PRICE_DIGITS_MAX) if row.has("money") else None,
        )
        row.close()
        if limit.tokens is None and limit.money is None and limit.requests is None:
            raise ConfigError(f"{row.where}: a limit needs tokens, requests or money")
        limits.append(limit)
    requests = table.integer("requests")
    share = table.integer("share", 1, low=1, high=SHARE_MAX)
    table.close()
    return TenantLimits(limits=tuple(limits), requests=requests, share=share or 1)
