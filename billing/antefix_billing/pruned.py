"""Summaries that replace the first segments of a ledger after they were pruned (removed): where the segments ended, and
their sums.

    pruned-000000012345.json    in the ledger's directory and in the archive; named by the last entry that was pruned

Each summary states which entries it replaces, the hashes before the first and after the last of them (so that the chain
continues), the names and BLAKE2b hashes of the files that held them, and sums by month, tenant, model and currency.
The summary is signed with the receipt key. With the pruned files at hand, anyone can recompute a summary.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from decimal import Decimal
from pathlib import Path
from typing import Any, Final, Self

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from antefix.checked_files import read_json
from antefix.errors import InvalidRequest
from antefix_billing.adjustment import Adjustment
from antefix_billing.ledger_format import GENESIS, Entry, EntryKind, LedgerCorrupt
from antefix_billing.pricing import moment_of
from antefix_billing.usage_record import UsageRecord

_DOMAIN: Final = b"antefix-pruned\0"
_GLOB: Final = "pruned-*.json"


@dataclass(slots=True, kw_only=True)
class Total:
    """Sums for one month (UTC, by the requests' start), tenant, model and currency.

    records: settled attempts. requests: those attempts that ended their request for good.
    """

    month: str
    tenant: str
    model: str
    currency: str
    records: int = 0
    requests: int = 0
    charged: int = 0
    prompt_tokens: int = 0
    cache_hit_tokens: int = 0
    cache_miss_tokens: int = 0
    cache_write_tokens: int = 0
    cache_write_1h_tokens: int = 0
    output_tokens: int = 0
    price: Decimal = Decimal(0)
    saved: Decimal = Decimal(0)
    adjusted: Decimal = Decimal(0)

    def to_dict(self) -> dict[str, Any]:
        return {name: format(v, "f") if isinstance(v, Decimal) else v for name, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        money = {name: Decimal(values[name]) for name in ("price", "saved", "adjusted")}
        return cls(**{**values, **money})


class Totals:
    """Sums over entries, which are added one by one."""

    def __init__(self) -> None:
        self._by_group: dict[tuple[str, str, str, str], Total] = {}

    def add(self, entry: Entry) -> None:
        if entry.kind is EntryKind.SETTLE:
            self._add_record(UsageRecord.from_payload(entry.payload))
        elif entry.kind is EntryKind.ADJUST:
            made = Adjustment.from_payload(entry.payload)
            self._of(made.created_us, made.tenant, made.model, made.currency).adjusted += made.amount

    def _add_record(self, record: UsageRecord) -> None:
        total = self._of(record.started_us, record.tenant, record.model, record.currency)
        total.records += 1
        total.requests += record.is_final
        total.charged += record.is_charged
        for name in _COUNTS:
            setattr(total, name, getattr(total, name) + getattr(record, name))
        total.price += record.price
        total.saved += record.saved

    def _of(self, time_us: int, tenant: str, model: str, currency: str) -> Total:
        group = (moment_of(time_us).strftime("%Y-%m"), tenant, model, currency)
        if group not in self._by_group:
            self._by_group[group] = Total(month=group[0], tenant=tenant, model=model, currency=currency)
        return self._by_group[group]

    def sums(self) -> tuple[Total, ...]:
        return tuple(self._by_group[group] for group in sorted(self._by_group))


_COUNTS: Final = tuple(field.name for field in fields(Total) if field.name.endswith("_tokens"))


@dataclass(frozen=True, slots=True, kw_only=True)
class PrunedFile:
    """A segment that was pruned: its file name, its length in bytes, and its BLAKE2b-256 hash in hex."""

    name: str
    nbytes: int
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Pruned:
    """Entries `first` to `last` of a ledger, which were pruned (removed). archive: the place of their files; empty if
    the files were not kept.
    """

    source: bytes
    first: int
    last: int
    previous_hash: bytes
    hash: bytes
    time_us: int
    archive: str
    files: tuple[PrunedFile, ...]
    totals: tuple[Total, ...]
    key_id: str = ""
    signature: bytes = b""

    def signed(self) -> bytes:
        """The bytes that the signature covers."""
        values = self.to_dict()
        del values["key_id"], values["signature"]
        return _DOMAIN + json.dumps(values, sort_keys=True, separators=(",", ":")).encode()

    def is_signed_by(self, public_keys: Iterable[bytes]) -> bool:
        for key in public_keys:
            try:
                Ed25519PublicKey.from_public_bytes(key).verify(self.signature, self.signed())
            except InvalidSignature:
                continue
            return True
        return False

    def to_dict(self) -> dict[str, Any]:
        return {
            "source": self.source.hex(),
            "first": self.first,
            "last": self.last,
            "previous_hash": self.previous_hash.hex(),
            "hash": self.hash.hex(),
            "time_us": self.time_us,
            "archive": self.archive,
            "files": [asdict(each) for each in self.files],
            "totals": [each.to_dict() for each in self.totals],
            "key_id": self.key_id,
            "signature": self.signature.hex(),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], what: str) -> Self:
        """Raises:  LedgerCorrupt: the values are not a valid summary."""
        try:
            return cls(
                source=bytes.fromhex(values["source"]),
                first=int(values["first"]),
                last=int(values["last"]),
                previous_hash=bytes.fromhex(values["previous_hash"]),
                hash=bytes.fromhex(values["hash"]),
                time_us=int(values["time_us"]),
                archive=str(values["archive"]),
                key_id=str(values["key_id"]),
                signature=bytes.fromhex(values["signature"]),
                files=tuple(PrunedFile(**each) for each in values["files"]),
                totals=tuple(Total.from_dict(each) for each in values["totals"]),
            )
        except (KeyError, TypeError, ValueError, ArithmeticError) as err:
            raise LedgerCorrupt(f"{what} is not the summary of a pruned ledger: {err}") from err


def summary_name(last: int) -> str:
    return f"pruned-{last:012d}.json"


def pruned_of(directory: Path) -> list[Pruned]:
    """The ledger's summaries, oldest first. Together the summaries cover all entries from 1 on, without a gap.

    Raises:  LedgerCorrupt: a summary is damaged or missing.
    """
    found = [Pruned.from_dict(read_json(path, "summary"), str(path)) for path in sorted(directory.glob(_GLOB))]
    last, hash = 0, GENESIS
    for each in found:
        if each.first != last + 1 or each.previous_hash != hash:
            raise LedgerCorrupt(
                f"the summary of entries {last + 1} to {each.first - 1}, pruned of {directory}, is missing"
            )
        last, hash = each.last, each.hash
    return found


def pruned_to(directory: Path) -> tuple[int, bytes]:
    """The number and the hash of the last pruned entry. The first remaining segment continues the chain from
    this hash.
    """
    summaries: Sequence[Pruned] = pruned_of(directory)
    return (summaries[-1].last, summaries[-1].hash) if summaries else (0, GENESIS)


def check_cursor(directory: Path, after: int) -> None:
    """Raises:  InvalidRequest: entries after this one were pruned, so continuing from here would skip them."""
    last, _ = pruned_to(directory)
    if 0 < after < last:
        raise InvalidRequest(
            f"entries {after + 1} to {last} of the ledger were pruned (removed); `antefix usage restore` brings "
            "them back"
        )
