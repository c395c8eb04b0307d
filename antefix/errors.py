"""One exception tree for every service; `antefix.rpc` maps it to gRPC statuses and back.

A cache miss is an answer, not an error: no exception here means "not cached". The name of each class says what is
wrong, its docstring what the caller does about it.
"""

from __future__ import annotations


class AntefixError(Exception):
    """Base of all errors that Antefix raises on purpose."""


class InternalError(AntefixError):
    """A bug in Antefix: one part called another in a way that is not allowed. Callers outside of Antefix can neither
    cause nor fix such an error. A service logs a bug and answers INTERNAL with only an error id, which the caller
    reports.
    """


class InvalidRequest(AntefixError):
    """The call is wrong in any state of the service. The caller fixes the call."""


class ConfigError(InvalidRequest):
    """A setting is malformed or missing. The message names the setting and the accepted values."""


class Unauthenticated(AntefixError):
    """The call has no valid token or certificate. The caller stops."""


class PermissionDenied(AntefixError):
    """The tenant does not have the permission for this call. The caller stops."""


class FingerprintMismatch(AntefixError):
    """The KV was made with other weights, another geometry or another record format. The caller treats this as a miss
    and raises an alert.
    """


class ResourceExhausted(AntefixError):
    """A limit is reached; the subclasses say which."""

    def __init__(self, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Overloaded(ResourceExhausted):
    """A queue is full. The caller backs off for `retry_after_s`.

    hold_s: for how long a server holds back the answer, because the caller does not back off.
    """

    hold_s: float = 0.0


class StoreFull(ResourceExhausted):
    """The store accepts no more writes, but still answers reads. The caller continues without storing."""


class QuotaExceeded(ResourceExhausted):
    """The tenant has reached a limit of its own. The caller backs off. Other tenants are not affected."""


class RateLimited(QuotaExceeded):
    """The tenant has used up its tokens for the current period. The caller waits until the period ends."""


class TooManyRequests(QuotaExceeded):
    """The tenant has its maximum number of requests running. The caller retries when one of them has ended."""


class BudgetExceeded(QuotaExceeded):
    """The tenant has used up its money for the current period. The caller asks for a larger budget
    before it retries.
    """


class Conflict(AntefixError):
    """The request id is used by a running request, or belongs to a finished one. The caller waits for that request's
    answer, or retries with another id.
    """


class Unavailable(AntefixError):
    """The other service is down, or is stopping. The caller tries another replica."""


class Draining(Unavailable):
    """The service is stopping and its grace period is over. The caller sends the request again, to the same address or
    to another replica.
    """


class DeadlineExceeded(AntefixError):
    """The call's deadline passed. Records that were stored before stay stored."""


class BlockCorrupt(AntefixError):
    """A checksum or header is wrong. The block is quarantined; the caller recomputes."""


class BlockUnusable(BlockCorrupt):
    """The stored bytes are those that were written, but they decode to NaN, infinity or numbers that are far too large.

    The block is quarantined; the caller recomputes.
    """


class NotFinite(Unavailable):
    """A model computed NaN or infinity. The result is neither stored nor sent. The caller tries another replica."""


class StepFailed(Unavailable):
    """The model failed for this request, and for no other. After such a failure, nothing more of the request is stored.
    The caller tries another replica once.
    """


class ModelError(InvalidRequest):
    """A model directory cannot be used: the message names the file or tensor and what was expected."""
