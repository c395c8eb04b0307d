"""The common part of OpenAI's two APIs with numbered choices: a call, its complete answer, its usage, its errors."""

from __future__ import annotations

import time
from typing import Any

from antefix_billing.providers import chat_usage
from antefix_router.gateway.choices import Choices
from antefix_router.gateway.http import error_event, event_bytes
from antefix_router.gateway.http_errors import Provider
from antefix_router.gateway.output import Output


class ChoicesCall:
    """One answer, or several. kind, id_prefix: those of the JSON objects in the answer."""

    kind: str
    id_prefix: str

    def __init__(
        self,
        choices: Choices,
        model: str,
        timeout_s: float,
        *,
        stream: bool,
        include_usage: bool,
        headers: dict[str, str],
    ) -> None:
        self.stream = stream
        self.headers = {"x-request-id": choices.request_id, **headers}
        self._choices = choices
        self._model = model
        self._timeout_s = timeout_s
        self._include_usage = include_usage
        self._created = int(time.time())

    async def whole(self) -> dict[str, Any]:
        async for _ in self._choices.deltas(self._timeout_s, held=True):
            pass
        shown = self._choices.shown
        choices = [self._whole_choice(index, output) for index, output in enumerate(shown)]
        self.headers |= shown[0].ended().headers
        return {**self._head(self.kind), "choices": choices, "usage": self._usage()}

    def failed(self, err: Exception) -> bytes:
        return error_event(err, Provider.OPENAI)

    def _whole_choice(self, index: int, output: Output) -> dict[str, Any]:
        raise NotImplementedError

    def _usage(self) -> dict[str, Any]:
        return self._choices.shown[0].ended().usage(chat_usage)

    def _event(self, kind: str, choices: list[dict[str, Any]], **more: Any) -> bytes:
        return event_bytes({**self._head(kind), "choices": choices, **more})

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": f"{self.id_prefix}-{self._choices.request_id}",
            "object": kind,
            "created": self._created,
            "model": self._model,
        }
