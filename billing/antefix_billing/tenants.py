"""Who may call, and how much: API keys and limits by tenant, read from TOML. Keys are kept as SHA-256, never in clear.

    [[tenant]]
    name = "acme"
    api_key_sha256 = ["<64 hex digits>"]        # printf %s "$KEY" | sha256sum
    requests = 8                                # at the same time
    limit = [{ window = "day", tokens = 5000000, money = "2.50" }]

A tenant named "*" holds the limits of everyone who is not named.
"""

from __future__ import annotations

import hashlib
import re
import tomllib
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any, Final

from antefix.errors import ConfigError, Unauthenticated
from antefix_billing.limits import Limit, LimitWindow, TenantLimits

# ASCII's and Latin-1's: what a terminal obeys instead of showing it.
CONTROL: Final = re.compile("[\x00-\x1f\x7f-\x9f]")


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantBook:
    """keys: SHA-256 of API keys to tenants; empty means that callers need no key and are the tenant ""."""

    keys: dict[bytes, str] = field(default_factory=dict)
    limits: dict[str, TenantLimits] = field(default_factory=dict)
    default: TenantLimits = field(default_factory=TenantLimits)

    def authenticate(self, api_key: str) -> str:
        """The tenant a key belongs to. Looking up a hash leaks no prefix of the key through its timing.

        Raises:  Unauthenticated: no such key.
        """
        if not self.keys:
            return ""
        tenant = self.keys.get(hashlib.sha256(api_key.encode()).digest())
        if tenant is None:
            raise Unauthenticated("the API key is missing or not known")
        return tenant


def load_tenants(path: str | Path) -> TenantBook:
    """Raises:  ConfigError: the file does not parse or does not make sense."""
    try:
        tables = tomllib.loads(Path(path).read_text())
        keys: dict[bytes, str] = {}
        limits: dict[str, TenantLimits] = {}
        for table in tables.pop("tenant", []):
            name = str(table.pop("name"))
            if CONTROL.search(name):
                raise ConfigError(f"tenant {name!r} has control characters in its name")
            for digest in table.pop("api_key_sha256", []):
                key = bytes.fromhex(digest)
                if len(key) != hashlib.sha256().digest_size or key in keys:
                    raise ConfigError(f"tenant {name}: an API key's SHA-256 is not 64 hex digits, or is there twice")
                keys[key] = name
            if name in limits:
                raise ConfigError(f"tenant {name} is there twice")
            limits[name] = _limits(table)
        if tables:
            raise ConfigError(f"unknown names: {', '.join(sorted(tables))}")
    except (OSError, tomllib.TOMLDecodeError, ConfigError, KeyError, ValueError, TypeError, InvalidOperation) as err:
        raise ConfigError(f"tenants file {path}: {err}") from err
    default = limits.pop("*", TenantLimits())
    return TenantBook(keys=keys, limits=limits, default=default)


def _limits(table: dict[str, Any]) -> TenantLimits:
    limits = []
    for row in table.pop("limit", []):
        tokens, money = row.pop("tokens", None), row.pop("money", None)
        if money is not None and not isinstance(money, str):
            raise ConfigError(f'money must be a string of digits, like "2.50"; is {money!r}')
        limit = Limit(
            window=LimitWindow(row.pop("window")),
            tokens=None if tokens is None else int(tokens),
            money=None if money is None else Decimal(money),
        )
        limits.append(limit)
        _refuse_rest(row)
    requests = table.pop("requests", None)
    _refuse_rest(table)
    return TenantLimits(limits=tuple(limits), requests=None if requests is None else int(requests))


def _refuse_rest(table: dict[str, Any]) -> None:
    if table:
        raise ConfigError(f"unknown names: {', '.join(sorted(table))}")
