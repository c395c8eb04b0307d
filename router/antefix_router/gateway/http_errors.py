"""Converts our exceptions into HTTP statuses and bodies in the form that each provider's clients read. Pure."""

from __future__ import annotations

import logging
import secrets
from enum import StrEnum
from typing import Any

from starlette.responses import JSONResponse

from antefix import errors
from antefix.outward import without_places
from antefix.sampling import WrongSetting
from antefix_router.front import ContextTooLong
from antefix_router.gateway.fields import WrongField

log = logging.getLogger("antefix.gateway")


class Provider(StrEnum):
    OPENAI = "openai"
    ANTHROPIC = "anthropic"


class NotFound(errors.AntefixError):
    """No such model or address. The caller fixes the call."""


class ModelNotFound(NotFound):
    """The requested model is not served here."""


class TooLarge(errors.InvalidRequest):
    """The body is larger than this server accepts."""


class TooSlow(errors.DeadlineExceeded):
    """The body did not arrive in time. The caller sends it again."""


class PassedError(errors.AntefixError):
    """Another engine's worker refused the request as invalid. The client gets that worker's error message."""

    def __init__(self, status: int, body: dict[str, Any]) -> None:
        error = body.get("error", body)
        message = error.get("message", "") if isinstance(error, dict) else str(error)
        super().__init__(str(message)[:1000] or f"the worker answered with status {status}")
        self.status = status
        self.body = body


# Most specific first: exception, HTTP status, OpenAI's type and code, Anthropic's type.
_TABLE: tuple[tuple[type[Exception], int, str, str, str], ...] = (
    (TooLarge, 413, "invalid_request_error", "request_too_large", "request_too_large"),
    (TooSlow, 408, "timeout_error", "request_timeout", "timeout_error"),
    (ModelNotFound, 404, "invalid_request_error", "model_not_found", "not_found_error"),
    (NotFound, 404, "invalid_request_error", "not_found", "not_found_error"),
    # Agents shorten their conversation when they see this code.
    (ContextTooLong, 400, "invalid_request_error", "context_length_exceeded", "invalid_request_error"),
    (errors.InvalidRequest, 400, "invalid_request_error", "invalid_value", "invalid_request_error"),
    (errors.Unauthenticated, 401, "authentication_error", "invalid_api_key", "authentication_error"),
    (errors.PermissionDenied, 403, "permission_error", "permission_denied", "permission_error"),
    (errors.Conflict, 409, "conflict_error", "conflict", "invalid_request_error"),
    # As in OpenAI's API, the type tells what was exceeded. Money has a code after which clients do not try again.
    (errors.RateLimited, 429, "tokens", "rate_limit_exceeded", "rate_limit_error"),
    (errors.TooManyRequests, 429, "requests", "concurrency_limit_exceeded", "rate_limit_error"),
    (errors.BudgetExceeded, 429, "insufficient_quota", "insufficient_quota", "rate_limit_error"),
    (errors.QuotaExceeded, 429, "tokens", "rate_limit_exceeded", "rate_limit_error"),
    (errors.ResourceExhausted, 429, "rate_limit_error", "server_overloaded", "rate_limit_error"),
    (errors.DeadlineExceeded, 504, "timeout_error", "timeout", "timeout_error"),
    (errors.Unavailable, 503, "service_unavailable_error", "service_unavailable", "overloaded_error"),
)


def error_body(err: Exception, provider: Provider) -> tuple[int, dict[str, Any]]:
    """Status and body. After an unexpected error, the body has only an id, which the log has too."""
    if isinstance(err, PassedError):
        return err.status, err.body
    for kind, status, openai_type, code, anthropic_type in _TABLE:
        if isinstance(err, kind):
            param = err.param if isinstance(err, (WrongField, WrongSetting)) else None
            code = err.code if isinstance(err, WrongField) else code
            message = _told(err, status)
            return status, _body(message, provider, openai_type, anthropic_type, code, param, has_code=status == 429)
    if isinstance(err, RecursionError):
        # Every JSON parser reports this in its own way: the body nests brackets deeper than any real request.
        return error_body(errors.InvalidRequest("the request body is nested too deeply"), provider)
    error_id = secrets.token_hex(6)
    log.error("internal error %s", error_id, exc_info=err)
    message = f"internal error {error_id}; the service's log has it"
    return 500, _body(message, provider, "server_error", "api_error", "internal_error")


def _told(err: Exception, status: int) -> str:
    """Errors about the client's own input are shown unchanged. For errors inside the service, internal addresses are
    left out.
    """
    is_about_input = isinstance(err, (errors.InvalidRequest, NotFound)) and status < 500
    message = str(err) if is_about_input else without_places(str(err))
    if status >= 500:
        log.warning("answered %d: %s: %s", status, type(err).__name__, err)
    if status == 504:
        message += "; this server has a limit on the time of a request (--http-timeout-s): ask for fewer output tokens"
    return message


def error_response(err: Exception, provider: Provider) -> JSONResponse:
    status, body = error_body(err, provider)
    headers = {}
    if isinstance(err, errors.ResourceExhausted) and err.retry_after_s is not None:
        headers["retry-after"] = str(max(1, round(err.retry_after_s)))
    if isinstance(err, errors.BudgetExceeded):
        # The clients of both providers obey this header.
        headers["x-should-retry"] = "false"
    if isinstance(err, TooSlow):
        # The rest of the body may still arrive, and must not be read as a new request.
        headers["connection"] = "close"
    if isinstance(err, errors.Unauthenticated):
        headers["www-authenticate"] = "Bearer"
    return JSONResponse(body, status_code=status, headers=headers)


def _body(
    message: str,
    provider: Provider,
    openai_type: str,
    anthropic_type: str,
    code: str,
    param: str | None = None,
    *,
    has_code: bool = False,
) -> dict[str, Any]:
    """has_code: the error's code has information that no other field has, so Anthropic's form gets the code too."""
    if provider is Provider.ANTHROPIC:
        # Anthropic's API does not define these fields. Its clients pass on fields that they do not know.
        named = {**({} if param is None else {"param": param}), **({"code": code} if has_code else {})}
        return {"type": "error", "error": {"type": anthropic_type, "message": message, **named}}
    return {"error": {"message": message, "type": openai_type, "param": param, "code": code}}
