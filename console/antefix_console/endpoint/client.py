"""Sends requests to an endpoint and measures its answers."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from antefix.errors import InvalidRequest, Unavailable
from antefix.extras import needs
from antefix.security.listening import is_loopback
from antefix.split_url import is_http_url, split_url
from antefix_console.endpoint.dialects import DIALECTS, Stream
from antefix_console.endpoint.reply import Question, Reply

if TYPE_CHECKING:
    import httpx

# httpx would log a line per request into the report.
logging.getLogger("httpx").setLevel(logging.WARNING)
# Events longer than this are not read: no answer to our requests has one.
_EVENT_CHARACTERS_MAX = 1 << 24
_ERROR_CHARACTERS_MAX = 300
_CONNECTIONS_MAX = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class EndpointConfig:
    """url: includes the API's version, such as https://api.example.com/v1.  api: chat, completions or messages.

    model: its name at the endpoint; empty: the first one that the endpoint lists.
    key: the API key, sent as the API requires; never printed.  timeout_s: longest time without any data from the
    endpoint.
    """

    url: str
    api: str
    model: str = ""
    key: str = ""
    timeout_s: float = 300.0

    def __post_init__(self) -> None:
        if self.api not in DIALECTS:
            raise InvalidRequest(f"unknown API {self.api!r}: use one of {', '.join(DIALECTS)}")
        if not is_http_url(self.url):
            raise InvalidRequest(
                f"{self.url!r} is no URL of an endpoint: such a URL begins with http:// or https://, then a host"
            )

    def __repr__(self) -> str:
        return f"{self.api} at {self.url}"


class EndpointClient:
    """One endpoint with one key. Use as `async with`."""

    def __init__(self, config: EndpointConfig) -> None:
        self.config = config
        self.model = config.model
        self._dialect = DIALECTS[config.api]
        self._http: httpx.AsyncClient | None = None

    async def __aenter__(self) -> Self:
        httpx = _httpx()
        self._http = httpx.AsyncClient(
            headers=self._dialect.headers(self.config.key),
            timeout=httpx.Timeout(self.config.timeout_s),
            # A proxy from the environment cannot reach this host's own addresses.
            trust_env=not is_loopback(split_url(self.config.url).hostname or ""),
            limits=httpx.Limits(max_connections=_CONNECTIONS_MAX, max_keepalive_connections=_CONNECTIONS_MAX),
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, err: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._http is not None
        await self._http.aclose()

    async def choose_model(self) -> str:
        """The model to use: the named one, or else the first one that the endpoint lists.

        Raises:  InvalidRequest: none was named, and the endpoint lists none.  Unavailable: the endpoint does not
        answer.
        """
        if not self.model:
            listed = await self.models()
            if not listed:
                raise InvalidRequest(
                    f"{self.config.url.rstrip('/')}/models lists no model: name one with --model, or correct the URL,"
                    " which includes the API's version, as in http://127.0.0.1:8000/v1"
                )
            self.model = listed[0]
        return self.model

    async def models(self) -> list[str]:
        """The models that the endpoint lists; empty if it offers no list.

        Raises:  Unavailable: the endpoint does not answer.
        """
        assert self._http is not None
        try:
            answer = await self._http.get(self.config.url.rstrip("/") + "/models")
            return [str(each["id"]) for each in answer.json()["data"]] if answer.status_code == 200 else []
        except (ValueError, KeyError, TypeError):
            return []
        except _httpx().HTTPError as err:
            raise Unavailable(f"{self.config.url} does not answer: {_said(err)}") from err

    async def ask(self, question: Question) -> Reply:
        """Send a request. If the endpoint refuses or fails, the reply has an error; no exception is raised.

        Raises:  InvalidRequest: the answer's `usage` is malformed.
        """
        assert self._http is not None
        url = self.config.url.rstrip("/") + self._dialect.path
        stream, timing = Stream(), _Timing()
        try:
            headers = {"idempotency-key": question.idempotency_key} if question.idempotency_key else {}
            body = self._dialect.body(self.model, question)
            request = self._http.stream("POST", url, json=body, headers=headers)
            async with request as answer:
                timing.request_id = answer.headers.get("x-request-id") or answer.headers.get("request-id") or ""
                if answer.status_code != 200:
                    said = (await answer.aread()).decode(errors="replace")
                    return _refused(answer.status_code, said, answer.headers, timing)
                async for event in _events(answer):
                    if self._dialect.read(event, stream):
                        timing.note()
        except _httpx().HTTPError as err:
            return Reply(status=0, error=_said(err), total_s=timing.elapsed_s(), request_id=timing.request_id)
        usage = self._dialect.usage(stream)
        error = stream.error or ("" if usage.prompt_tokens else "the answer has no usage: it broke off")
        return Reply(
            status=200,
            error=error,
            ttft_s=timing.ttft_s,
            gaps_s=tuple(timing.gaps_s),
            total_s=timing.elapsed_s(),
            text="".join(stream.text),
            logprobs=tuple(stream.logprobs),
            usage=usage,
            answer_id=stream.answer_id,
            request_id=timing.request_id,
        )


class _Timing:
    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._last = 0.0
        self.ttft_s = 0.0
        self.gaps_s: list[float] = []
        self.request_id = ""

    def elapsed_s(self) -> float:
        return time.perf_counter() - self._started

    def note(self) -> None:
        now = time.perf_counter()
        if self._last:
            self.gaps_s.append(now - self._last)
        else:
            self.ttft_s = now - self._started
        self._last = now


async def _events(answer: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    """The `data:` lines of a stream of server-sent events, each of them JSON here."""
    async for line in answer.aiter_lines():
        if not line.startswith("data:") or len(line) > _EVENT_CHARACTERS_MAX:
            continue
        data = line[5:].strip()
        if data == "[DONE]":
            return
        try:
            event = json.loads(data)
        except (ValueError, RecursionError):
            continue
        if isinstance(event, dict):
            yield event


def _refused(status: int, body: str, headers: httpx.Headers, timing: _Timing) -> Reply:
    try:
        error = json.loads(body)["error"]
        said = str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, KeyError, TypeError, RecursionError):
        said = body
    return Reply(
        status=status,
        error=f"{status}: {said[:_ERROR_CHARACTERS_MAX]}",
        total_s=timing.elapsed_s(),
        retry_after_s=_seconds(headers.get("retry-after", "")),
        request_id=timing.request_id,
    )


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        return 0.0
    return value if math.isfinite(value) and value > 0 else 0.0


def _said(err: Exception) -> str:
    return f"{type(err).__name__}: {err}" if str(err) else type(err).__name__


def _httpx() -> Any:
    try:
        import httpx
    except ModuleNotFoundError as err:
        raise InvalidRequest(needs("this command", "httpx", "client")) from err
    return httpx
