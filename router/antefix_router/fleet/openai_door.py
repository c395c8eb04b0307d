"""Client of one worker's OpenAI HTTP API: its models, the tokens of prompts, and requests passed to it unchanged."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass
from typing import Any, Final

import httpx

from antefix.checked_files import parse_json
from antefix.errors import DeadlineExceeded, InvalidRequest, NotFinite, Overloaded, StepFailed, Unavailable
from antefix.whole_number import whole_number
from antefix_router.fleet.fleet_config import EnginePlace
from antefix_router.gateway.http_errors import PassedError
from antefix_router.gateway.text_check import path_of_no_number

# The timeout for beginning a call. Each request has its own limit for the answer.
CONNECT_S: Final = 5.0
TOKENIZE_S: Final = 10.0
_ASK_S: Final = 5.0
# How long idle connections are kept. If the worker closes one first, a call fails. uvicorn's default is 5 s.
_IDLE_S: Final = 4.0
_ERROR_BYTES_MAX: Final = 64 << 10
_EVENT_BYTES_MAX: Final = 16 << 20
_RETRY_AFTER_S_MAX: Final = 24 * 3600


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """num_tokens_max: the model's context in tokens; 0 if the worker does not report it. is_adapter: the model is an
    adapter of another model. An adapter of a model has KV of its own.
    """

    name: str
    num_tokens_max: int = 0
    is_adapter: bool = False


def http_client(api_key: str = "") -> httpx.AsyncClient:
    """The HTTP client for all workers."""
    # One log line per call would repeat the access log.
    logging.getLogger("httpx").setLevel(logging.WARNING)
    return httpx.AsyncClient(
        timeout=httpx.Timeout(None, connect=CONNECT_S),
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=_IDLE_S),
        headers={"authorization": f"Bearer {api_key}"} if api_key else {},
        # A proxy in the environment is for outside addresses, not for the fleet.
        trust_env=False,
    )


class OpenAIDoor:
    """place: the engine. If a worker has several ranks, a header names the rank; both vLLM and SGLang read this
    header.
    """

    def __init__(self, place: EnginePlace, http: httpx.AsyncClient) -> None:
        self.place = place
        self._http = http

    async def check_health(self) -> None:
        """Raises:  Unavailable, Overloaded: the worker cannot serve now."""
        with _errors(self.place.address):
            async with asyncio.timeout(_ASK_S), self._sent("GET", "/health", None) as response:
                # For a server without this address, the list of its models shows whether it is healthy.
                if response.status_code != 404:
                    await self._check(response)

    async def models(self) -> tuple[ServedModel, ...]:
        """The models that the worker serves.  Raises:  Unavailable."""
        body = await self._json("GET", "/v1/models", None, _ASK_S)
        found = body.get("data")
        if not isinstance(found, list):
            raise Unavailable(f"{self.place.address} lists no models")
        return tuple(
            ServedModel(
                name=each["id"],
                num_tokens_max=_length(each.get("max_model_len")),
                is_adapter=bool(each.get("parent")),
            )
            for each in found
            if isinstance(each, dict) and isinstance(each.get("id"), str)
        )

    async def tokenize(self, body: dict[str, Any]) -> list[int]:
        """The tokens of a prompt or a conversation, by the worker's own template.

        Raises:  PassedError: the worker refuses the request, or has no such address.  Unavailable.
        """
        answer = await self._json("POST", "/tokenize", body, TOKENIZE_S)
        tokens = answer.get("tokens")
        if not isinstance(tokens, list) or not all(type(token) is int and 0 <= token < 1 << 32 for token in tokens):
            raise Unavailable(f"{self.place.address} gave no tokens")
        return tokens

    async def whole(self, path: str, body: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        """The worker's answer as one JSON object.  Raises: as `events`."""
        answer = await self._json("POST", path, body, timeout_s)
        if (where := path_of_no_number(answer)) is not None:
            # The answer could not be passed to the client, since JSON has neither NaN nor infinity.
            raise NotFinite(f"{self.place.address} answered with a number that is not finite: {where}")
        return answer

    async def events(self, path: str, body: dict[str, Any], timeout_s: float) -> AsyncGenerator[str, None]:
        """The server-sent events of an answer: the text after each `data: `, without the final `[DONE]`.

        Raises:  PassedError: the worker refused the request.  Unavailable: the worker cannot be reached, failed, or
        went away.  Overloaded: the worker is full.  DeadlineExceeded.
        """
        ends = time.monotonic() + timeout_s
        with _errors(self.place.address):
            async with contextlib.AsyncExitStack() as stack:
                # The timeout is set within each step, because it belongs to a task and the reader may continue in
                # another task.
                async with asyncio.timeout(timeout_s):
                    response = await stack.enter_async_context(self._sent("POST", path, body))
                    await self._check(response)
                found = await stack.enter_async_context(contextlib.aclosing(_data_of(response)))
                while True:
                    async with asyncio.timeout(ends - time.monotonic()):
                        data = await anext(found, None)
                    if data is None:
                        raise Unavailable(f"the worker at {self.place.address} broke an answer off before its end")
                    if data == "[DONE]":
                        return
                    yield data

    async def _json(self, method: str, path: str, body: dict[str, Any] | None, timeout_s: float) -> dict[str, Any]:
        with _errors(self.place.address):
            async with asyncio.timeout(timeout_s), self._sent(method, path, body) as response:
                await self._check(response)
                value = json.loads(await response.aread())
        if not isinstance(value, dict):
            raise Unavailable(f"{self.place.address} did not answer with a JSON object")
        return value

    @contextlib.asynccontextmanager
    async def _sent(self, method: str, path: str, body: dict[str, Any] | None) -> AsyncIterator[httpx.Response]:
        headers = {}
        if self.place.rank is not None and body is not None:
            headers["x-data-parallel-rank"] = str(self.place.rank)
        async with self._http.stream(method, self.place.url + path, json=body, headers=headers) as response:
            yield response

    async def _check(self, response: httpx.Response) -> None:
        status = response.status_code
        if status < 400:
            return
        raw = bytearray()
        async for piece in response.aiter_bytes():
            raw += piece
            if len(raw) > _ERROR_BYTES_MAX:
                break
        text = raw.decode(errors="replace")
        who = f"{self.place.address} answered {status}: {text[:200]}"
        if status in (429, 503):
            retry = whole_number(response.headers.get("retry-after"), _RETRY_AFTER_S_MAX)
            raise Overloaded(who, retry_after_s=1.0 if retry is None else float(retry))
        if status == 500:
            raise StepFailed(who)
        if status >= 500 or status in (401, 403):
            # If a worker refuses our credentials, our client cannot mend that.
            raise Unavailable(who)
        try:
            # The client gets this body, and could not be sent NaN or infinity.
            body = parse_json(text, self.place.address)
        except InvalidRequest:
            body = {"error": {"message": text[:1000], "type": "invalid_request_error", "param": None, "code": None}}
        raise PassedError(status, body if isinstance(body, dict) else {"error": {"message": text[:1000]}})


async def _data_of(response: httpx.Response) -> AsyncGenerator[str, None]:
    """The data of each event. Several data lines of an event are joined as the standard says."""
    lines: list[str] = []
    async for line in response.aiter_lines():
        if line.startswith("data:"):
            lines.append(line[5:].removeprefix(" "))
            if sum(map(len, lines)) > _EVENT_BYTES_MAX:
                raise Unavailable("one event in the stream of a worker is too long")
        elif not line and lines:
            yield "\n".join(lines)
            lines = []
    if lines:
        yield "\n".join(lines)


@contextlib.contextmanager
def _errors(address: str) -> Any:
    try:
        yield
    except httpx.TimeoutException as err:
        raise Unavailable(f"{address} does not answer: {type(err).__name__}") from err
    except (httpx.TransportError, httpx.StreamError) as err:
        raise Unavailable(f"{address}: {type(err).__name__}: {err}") from err
    except TimeoutError as err:
        raise DeadlineExceeded(f"{address} took too long") from err
    except (ValueError, RecursionError) as err:
        raise Unavailable(f"{address} did not answer with JSON: {err}") from err


def _length(value: object) -> int:
    """The length of a model's context; 0 if the worker does not say one that can be used."""
    number = whole_number(value) if isinstance(value, str) else value
    return number if type(number) is int and number > 0 else 0
