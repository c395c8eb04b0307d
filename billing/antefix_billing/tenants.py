"""Who may call, and how much: API keys and limits by tenant, read from TOML. Keys are kept as SHA-256, never in clear.

    keys = "needed"                             # or "none", where nobody is asked for one: then limits are all there is

    [[tenant]]
    name = "acme"
    api_key_sha256 = ["<64 hex digits>"]        # printf %s "$KEY" | sha256sum
    requests = 8                                # at the same time
    limit = [{ window = "day", tokens = 5000000, money = "2.50" }]

A tenant named "*" holds the limits of everyone who is not named. Keys that come and go are in a file of their own
(`api_keys`). A file without any key is a mistake unless it says so: it would let everybody in.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

from antefix.errors import ConfigError
from antefix.private_file import refuse_writable
from antefix_billing.api_keys import CONTROL, check_digest
from antefix_billing.limits import Limit, LimitWindow, TenantLimits


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantBook:
    """keys: SHA-256 of API keys to tenants.  needs_keys: False only where the file says so, or there is no file."""

    keys: dict[bytes, str] = field(default_factory=dict)
    limits: dict[str, TenantLimits] = field(default_factory=dict)
    default: TenantLimits = field(default_factory=TenantLimits)
    needs_keys: bool = False


def load_tenants(path: str | Path, *, has_other_keys: bool = False) -> TenantBook:
    """has_other_keys: there is a file of API keys as well, so this one need not have any.

    Raises:  ConfigError: the file does not parse or does not make sense, or it would let everybody in.
    """
    refuse_writable(path, "tenants file")
    try:
        tables = tomllib.loads(Path(path).read_text())
        asked = tables.pop("keys", "needed")
        if asked not in ("needed", "none"):
            raise ConfigError(f'keys must be "needed" or "none", is {asked!r}')
        keys: dict[bytes, str] = {}
        limits: dict[str, TenantLimits] = {}
        for table in tables.pop("tenant", []):
            name = str(table.pop("name"))
            if CONTROL.search(name):
                raise ConfigError(f"tenant {name!r} has control characters in its name")
            for digest in table.pop("api_key_sha256", []):
                key = bytes.fromhex(digest)
                check_digest(key, f"tenant {name}")
                if key in keys:
                    raise ConfigError(f"tenant {name}: an API key's SHA-256 is there twice")
                if name in ("", "*"):
                    raise ConfigError(f"tenant {name!r} is nobody's name and can have no key")
                keys[key] = name
            if name in limits:
                raise ConfigError(f"tenant {name} is there twice")
            limits[name] = _limits(table)
        if tables:
            raise ConfigError(f"unknown names: {', '.join(sorted(tables))}")
        if asked == "none" and (keys or has_other_keys):
            raise ConfigError('it says keys = "none", but there are keys')
        if asked == "needed" and not keys and not has_other_keys:
            raise ConfigError(
                "it has no API key, so everybody could call: add api_key_sha256, give --api-keys-file, or say"
                ' keys = "none"'
            )
    except (
        *(OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, ConfigError),
        *(AttributeError, KeyError, ValueError, TypeError, InvalidOperation),
    ) as err:
        raise ConfigError(f"tenants file {path}: {err}") from err
    default = limits.pop("*", TenantLimits())
    return TenantBook(keys=keys, limits=limits, default=default, needs_keys=asked == "needed")


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
        if limit.tokens is None and limit.money is None:
            raise ConfigError("a limit needs tokens or money")
        if (limit.tokens or 0) < 0 or not (limit.money or Decimal(0)).is_finite() or (limit.money or 0) < 0:
            raise ConfigError(f"a limit must be a number from 0, is tokens {tokens}, money {money}")
        limits.append(limit)
        _refuse_rest(row)
    requests = table.pop("requests", None)
    _refuse_rest(table)
    return TenantLimits(limits=tuple(limits), requests=None if requests is None else int(requests))


def _refuse_rest(table: dict[str, Any]) -> None:
    if table:
        raise ConfigError(f"unknown names: {', '.join(sorted(table))}")
