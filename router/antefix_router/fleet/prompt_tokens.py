"""Asks the workers for the tokens of a request's prompt, from which its blocks are named.

The workers render a conversation with their own template, tools and settings, so their answer is what they will
compute. If the router rendered it itself and one token differed, no block would match. vLLM and SGLang have the address
`/tokenize` for this. If no worker answers `/tokenize`, the request is placed by load alone.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Final

from antefix.block import as_tokens
from antefix.clients import Tokens
from antefix.errors import AntefixError
from antefix.telemetry import span
from antefix_router.fleet.engines import Engine
from antefix_router.fleet.passed_call import COMPLETIONS
from antefix_router.gateway.http_errors import PassedError
from antefix_router.placement.workers import Workers

log = logging.getLogger("antefix.fleet")

_NUM_TRIES_MAX: Final = 2
# The fields of a conversation that its template sees.
_CHAT_FIELDS: Final = (
    *("model", "messages", "tools", "tool_choice", "reasoning_effort", "add_generation_prompt"),
    *("continue_final_message", "add_special_tokens", "chat_template", "chat_template_kwargs", "mm_processor_kwargs"),
    "documents",
)
_COMPLETION_FIELDS: Final = ("model", "prompt", "add_special_tokens")


class PromptTokens:
    """Asks the workers of one fleet for tokens. A worker that does not have `/tokenize` is not asked again."""

    def __init__(self, engines: Sequence[Engine], workers: Workers) -> None:
        self._engines = engines
        self._workers = workers
        self._without: set[str] = set()

    async def of(self, path: str, body: Mapping[str, Any], model: str) -> Tokens | None:
        """The prompt's tokens. None: no worker could count the prompt's tokens; the worker that gets the request will
        accept or refuse it.
        """
        prompt = body.get("prompt") if path == COMPLETIONS else None
        if (given := _token_ids(prompt)) is not None:
            return as_tokens(given)
        if isinstance(prompt, list):
            return None  # several prompts in one request
        fields = _COMPLETION_FIELDS if path == COMPLETIONS else _CHAT_FIELDS
        asked = {name: body[name] for name in fields if body.get(name) is not None}
        with span("tokenize"):
            for engine in self._to_ask(model)[:_NUM_TRIES_MAX]:
                try:
                    return as_tokens(await engine.door.tokenize(asked))
                except PassedError as err:
                    if err.status not in (404, 405, 501):
                        # A worker that cannot render a request may still be able to answer it. If not, its own error
                        # says why.
                        return None
                    log.warning(
                        "worker %s has no /tokenize, so the router stops asking it for tokens", engine.place.address
                    )
                    self._without.add(engine.place.url)
                except AntefixError as err:
                    log.warning("worker %s did not turn a prompt into tokens: %s", engine.place.address, err)
        return None

    def _to_ask(self, model: str) -> list[Engine]:
        """The workers that have the address `/tokenize`, the least busy first."""
        able = [each for each in self._engines if each.is_up and each.serves(model)]
        able = [each for each in able if each.place.url not in self._without]
        busy = {worker.address: worker.num_requests for worker in self._workers.workers}
        return sorted(able, key=lambda each: busy.get(each.place.address, 0))


def _token_ids(prompt: Any) -> list[int] | None:
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], list):
        prompt = prompt[0]
    if isinstance(prompt, list) and prompt and all(type(token) is int and 0 <= token < 1 << 32 for token in prompt):
        return prompt
    return None
