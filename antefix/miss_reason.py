"""Why a block missed: one list of reasons for stores, workers, the bill, metrics, headers and `antefix explain`."""

from __future__ import annotations

from enum import StrEnum


class MissReason(StrEnum):
    """Why a block missed. The values of this enum are part of the protocols and of the ledger's format, so they are
    never renamed.
    """

    # No miss: the block is stored, or only the tokens after the prompt's last whole block were computed.
    NONE = ""
    # The block was never stored, or it was evicted so long ago that the store has forgotten it.
    FIRST_SEEN = "first_seen"
    EVICTED = "evicted"
    EXPIRED = "expired"
    # The block is stored, but computing it again was predicted to be faster than rebuilding the window state after it.
    WINDOW_MISSING = "window_missing"
    # The prompt is too short: it is not longer than one block.
    BELOW_MINIMUM = "below_minimum"
    FINGERPRINT_DIFFERS = "fingerprint_differs"
    # The block is stored under the same settings, but was computed by a set-up that rounds differently.
    ARITHMETIC_DIFFERS = "arithmetic_differs"
    CORRUPT = "corrupt"
    STORE_UNAVAILABLE = "store_unavailable"
    # The store did not answer in the usual time, and computing the prompt was faster than its late answer.
    STORE_LATE = "store_late"
    # The block is stored, but a block before it is not. Never the reason of a prompt's first miss.
    UNREACHABLE = "unreachable"
    # For engines' workers: by its events, the worker that answered had the block, but it reported no hit.
    LOST_HIT = "lost_hit"
    # Another worker had the block; the worker that answered was chosen because it was less busy.
    OTHER_WORKER = "other_worker"
    # A newer peer sent a reason that this process does not know.
    UNKNOWN = "unknown"

    @classmethod
    def _missing_(cls, value: object) -> MissReason:
        # A newer worker may send a reason that this process does not know. The request must not fail for that.
        return cls.UNKNOWN

    @property
    def label(self) -> str:
        """The reason's label in headers and metrics, which cannot have empty values."""
        return self.value or "none"
