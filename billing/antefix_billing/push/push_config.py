"""Where usage is sent, read from TOML.

[[sink]] name = "stripe"                     # names the files of its cursors and dead letters kind = "stripe"
# openmeter, lago, stripe or webhook url = "https://api.stripe.com"      # https, or http to this host key_file =
"stripe.key"             # the API key, or the secret of a webhook's HMAC; for its owner only unmapped = "dead_letter"
# a tenant without a customer: dead_letter, skip, or name (sent under its name) meters = { antefix_input =
"cache_miss_tokens", antefix_hits = "cache_hit_tokens" }   # stripe: event names code = "antefix"                    #
lago: the billable metric's customers = { acme = "cus_123" }
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from antefix.checked_files import read_toml
from antefix.checked_table import Table
from antefix.errors import ConfigError
from antefix.private_file import read_private
from antefix.security.listening import is_loopback
from antefix.split_url import split_url

KINDS: Final = ("openmeter", "lago", "stripe", "webhook")
UNMAPPED: Final = ("dead_letter", "skip", "name")
_URLS: Final = {
    "openmeter": "https://openmeter.cloud",
    "lago": "https://api.getlago.com/",
    "stripe": "https://api.stripe.com",
}
_METERS: Final = {
    "antefix_hit_tokens": "cache_hit_tokens",
    "antefix_miss_tokens": "cache_miss_tokens",
    "antefix_output_tokens": "output_tokens",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SinkConfig:
    """One receiver.  key: in plaintext."""

    name: str
    kind: str
    url: str
    key: str = field(repr=False)
    unmapped: str = "dead_letter"
    meters: dict[str, str] = field(default_factory=dict)
    code: str = "antefix"
    customers: dict[str, str] = field(default_factory=dict)

    def customer(self, tenant: str) -> str | None:
        """The receiver's name for this tenant; None if the receiver has no such customer."""
        return self.customers.get(tenant or "default") or ((tenant or "default") if self.unmapped == "name" else None)


def load_sinks(path: Path) -> list[SinkConfig]:
    """Read the receivers.

    Raises:  ConfigError: the file does not parse, a setting is invalid, or others can read a key file.
    """
    file = Table(read_toml(path, "push settings"), f"push settings {path}")
    sinks = [_sink(table, path.parent) for table in file.children("sink")]
    file.close()
    if not sinks:
        raise ConfigError(f"push settings {path} must name at least one [[sink]]")
    if len({sink.name for sink in sinks}) < len(sinks):
        raise ConfigError(f"push settings {path}: two sinks have one name")
    return sinks


def _sink(table: Table, directory: Path) -> SinkConfig:
    kind = table.one_of("kind", KINDS)
    name = table.text("name", kind)
    if not name.replace("-", "").replace("_", "").isalnum():
        raise table.wrong("name", "letters, digits, - and _", name)
    url = table.text("url", _URLS.get(kind))
    parts = split_url(url)
    if parts.scheme != "https" and not (parts.scheme == "http" and is_loopback(parts.hostname or "")):
        raise table.wrong("url", "an https:// URL, or http:// to this host", url)
    key_file = directory / table.text("key_file")
    meters = _texts_by_name(table, "meters") or dict(_METERS)
    sink = SinkConfig(
        name=name,
        kind=kind,
        url=url,
        key=read_private(key_file, "key_file").strip(),
        unmapped=table.one_of("unmapped", UNMAPPED, "dead_letter"),
        meters=meters,
        code=table.text("code", "antefix"),
        customers=_texts_by_name(table, "customers"),
    )
    table.close()
    if not sink.key:
        raise ConfigError(f"{table.where}: key_file {key_file} is empty")
    return sink


def _texts_by_name(table: Table, name: str) -> dict[str, str]:
    found = table.take(name, {})
    if not isinstance(found, dict) or not all(isinstance(value, str) and value for value in found.values()):
        raise table.wrong(name, "a table of names and texts", found)
    return dict(found)
