"""One exception tree for every service; `antefix.rpc` maps it to gRPC statuses and back.

A miss is an answer, not an error: nothing here means "not cached". The name of each class says what
is wrong, its docstring what the caller does about it.
"""

from __future__ import annotations


class AntefixError(Exception):
    """Base of all errors that Antefix raises on purpose."""


class InternalError(AntefixError):
    """A bug of ours: one part of Antefix called another in a way that it must not. No caller from outside can cause
    or mend it. A service logs it and answers INTERNAL with an id alone; the caller reports that id.
    """


class InvalidRequest(AntefixError):
    """Wrong whatever our state is. The caller fixes the call."""


class ConfigError(InvalidRequest):
    """A setting is malformed or missing. The message names the setting and the accepted values."""


class Unauthenticated(AntefixError):
    """No valid token. The caller stops."""


class PermissionDenied(AntefixError):
    """The tenant may not do this. The caller stops."""


class FingerprintMismatch(AntefixError):
    """Other weights, geometry or record format. The caller treats it as a miss and alerts."""


class ResourceExhausted(AntefixError):
    """A limit is reached; the subclasses say which."""

    def __init__(self, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Overloaded(ResourceExhausted):
    """A queue is full. The caller backs off for `retry_after_s`."""


class StoreFull(ResourceExhausted):
    """The store takes no more writes; reads continue. The caller skips the store."""


class QuotaExceeded(ResourceExhausted):
    """The tenant's own limit. The caller backs off, other tenants are not affected."""


class RateLimited(QuotaExceeded):
    """The tenant's tokens of a time are used up. The caller waits until that time ends."""


class TooManyRequests(QuotaExceeded):
    """As many of the tenant's requests run as may. The caller sends it again when one of them has ended."""


class BudgetExceeded(QuotaExceeded):
    """The tenant's money of a time is used up. The caller asks for more of it; trying again is of no use before."""


class Conflict(AntefixError):
    """The request id is in use, or used up. The caller waits for the first answer or takes another id."""


class Unavailable(AntefixError):
    """The peer is down or draining. The caller tries another replica."""


class Draining(Unavailable):
    """It is stopping, and its grace period is over. The caller sends the request again, there or to another replica."""


class DeadlineExceeded(AntefixError):
    """The call's deadline passed. What was stored stays stored."""


class BlockCorrupt(AntefixError):
    """A checksum or header is wrong. The block is quarantined; the caller recomputes."""


class BlockUnusable(BlockCorrupt):
    """The bytes are the ones that were written, but stand for no numbers (NaN, infinity) or far too large ones.

    The block is quarantined; the caller recomputes.
    """


class NotFinite(Unavailable):
    """A model computed what is no number. Nothing of it is stored or sent; the caller tries another replica."""


class StepFailed(Unavailable):
    """The model failed for this request, and for no other. Nothing of it is stored; the caller tries another replica,
    once."""


class ModelError(InvalidRequest):
    """A model directory cannot be used: the message names the file or tensor and what was expected."""
