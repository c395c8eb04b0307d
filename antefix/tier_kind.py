"""The kinds of tiers that stored KV is read from, and the labels that receipts, metrics and plans give them."""

from __future__ import annotations

from enum import StrEnum


class TierKind(StrEnum):
    """How far away a tier is, nearest first. The values of this enum are part of receipts and metrics, so they are
    never renamed.
    """

    PAGE_CACHE = "page_cache"
    DISK = "disk"
    PEER = "peer"
    OBJECT = "object"


def label_of(kind: TierKind, name: str) -> str:
    """Such as `peer:rack-2`."""
    return f"{kind}:{name}"
