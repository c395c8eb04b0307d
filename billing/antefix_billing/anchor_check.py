"""Checks that a ledger still holds the entries that its anchors name. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from antefix_billing.anchor import Anchor
from antefix_billing.pricing import moment_of


@dataclass(frozen=True, slots=True, kw_only=True)
class AnchorVerdict:
    """The result of checking a ledger against its anchors.

    anchors: how many anchors were checked.  anchored_to: the last entry that an anchor confirms; later entries are
    protected by the hash chain alone.  faults: each mismatch, with its position.  unsigned: how many anchors have no
    signature by a known key; None if no key was given.
    """

    anchors: int
    anchored_to: int
    faults: tuple[str, ...]
    unsigned: int | None

    @property
    def ok(self) -> bool:
        return not self.faults and not self.unsigned


def check_anchors(
    anchors: Sequence[Anchor],
    hashes: Mapping[int, bytes],
    *,
    first: int,
    head: int,
    public_keys: Iterable[bytes],
    chain_error: str = "",
) -> AnchorVerdict:
    """Check anchors of one ledger against the entries of that ledger.

    hashes: hashes of the ledger's entries, at least of those that the anchors name.  first, head: the numbers of the
    ledger's first and last entry; entries before the first were pruned.  chain_error: why reading the ledger stopped at
    the head.
    """
    keys = list(public_keys)
    unsigned = [anchor for anchor in anchors if keys and not anchor.is_signed_by(keys)]
    trusted = sorted((a for a in anchors if a not in unsigned), key=lambda a: (a.sequence, a.time_us))
    confirmed, faults = 0, []
    for anchor in trusted:
        if anchor.sequence < first and anchor.sequence not in hashes:
            continue  # the entry was pruned
        if anchor.sequence > head:
            if not chain_error:
                faults.append(
                    f"entries {head + 1} to {anchor.sequence} are gone: {_what(anchor)} has entry {anchor.sequence},"
                    f" but the ledger ends with entry {head}. Its end was cut off, or an older copy was put back"
                )
            break
        if hashes.get(anchor.sequence) != anchor.hash:
            faults.append(
                f"entry {anchor.sequence} is another one than {_what(anchor)} has: the ledger was replaced or written"
                f" again between entries {confirmed + 1} and {anchor.sequence}"
            )
            break
        confirmed = anchor.sequence
    return AnchorVerdict(
        anchors=len(trusted),
        anchored_to=confirmed,
        faults=tuple(faults),
        unsigned=len(unsigned) if keys else None,
    )


def _what(anchor: Anchor) -> str:
    if anchor.is_receipt:
        return "a receipt"
    return f"the anchor of {moment_of(anchor.time_us).isoformat(timespec='seconds')}"
