"""Why a block missed: one list from the store to the worker, the bill, metrics, headers and `antefix explain`."""

from __future__ import annotations

from enum import StrEnum


class MissReason(StrEnum):
    """Why a block missed. Values are part of the protocols and of the ledger's format: never renamed."""

    # Nothing missed: the block is stored, or only the rest of the prompt's last block was left.
    NONE = ""
    # Never stored, or so long ago that the store has forgotten it.
    FIRST_SEEN = "first_seen"
    EVICTED = "evicted"
    EXPIRED = "expired"
    # Stored, but computing it again was predicted faster than rebuilding the window state to continue from it.
    WINDOW_MISSING = "window_missing"
    # The prompt has no whole block and a token more.
    BELOW_MINIMUM = "below_minimum"
    FINGERPRINT_DIFFERS = "fingerprint_differs"
    # Stored under the same settings, computed by a set-up that rounds differently.
    ARITHMETIC_DIFFERS = "arithmetic_differs"
    CORRUPT = "corrupt"
    STORE_UNAVAILABLE = "store_unavailable"
    # Stored behind a block that is not. Never the reason of a first miss.
    UNREACHABLE = "unreachable"
    # Workers that are not ours: the events of the one that answered said that it has the block, and it did not hit.
    LOST_HIT = "lost_hit"
    # Another worker had it; this one was chosen for having less to do.
    OTHER_WORKER = "other_worker"
    # A newer peer's, which this process does not know.
    UNKNOWN = "unknown"

    @classmethod
    def _missing_(cls, value: object) -> MissReason:
        # A newer worker may know a reason that this process does not; a request must not fail for that.
        return cls.UNKNOWN

    @property
    def label(self) -> str:
        """For headers and metrics, where an empty value counts as none given."""
        return self.value or "none"
