"""Writes log probabilities in OpenAI's three formats. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from antefix.tokenizer import Tokenizer
from antefix.wire import TokenLogprob


@dataclass(frozen=True, slots=True, kw_only=True)
class SpokenToken:
    """One token of an answer. start: how many characters of the raw answer come before the token, before reasoning and
    calls are separated.
    """

    token: int
    start: int
    is_reasoning: bool
    logprob: TokenLogprob


class LogprobWriter:
    """Writes log probabilities for one request's client."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def chat(self, tokens: Sequence[SpokenToken]) -> dict[str, Any] | None:
        """`choices[].logprobs` of chat, with reasoning separate as in DeepSeek's API. Returns None if there are no
        tokens to report.
        """
        if not tokens:
            return None
        lists: dict[str, Any] = {"content": [self.full(each) for each in tokens if not each.is_reasoning]}
        if reasoning := [self.full(each) for each in tokens if each.is_reasoning]:
            lists["reasoning_content"] = reasoning
        return {**lists, "refusal": None}

    def completion(self, tokens: Sequence[SpokenToken]) -> dict[str, Any]:
        """`choices[].logprobs` of text completions."""
        return {
            "tokens": [self._key(each.token) for each in tokens],
            "token_logprobs": [each.logprob.logprob for each in tokens],
            "top_logprobs": [self._top(each) for each in tokens],
            "text_offset": [each.start for each in tokens],
        }

    def full(self, spoken: SpokenToken) -> dict[str, Any]:
        """One token in the chat API's format, which the Responses API uses too."""
        top = [self._one(token, logprob) for token, logprob in spoken.logprob.top]
        return {**self._one(spoken.token, spoken.logprob.logprob), "top_logprobs": top}

    def _top(self, spoken: SpokenToken) -> dict[str, float]:
        """The chosen token is included even if it is not one of the likeliest."""
        pairs = ((spoken.token, spoken.logprob.logprob), *spoken.logprob.top)
        return {self._key(token): logprob for token, logprob in pairs}

    def _one(self, token: int, logprob: float) -> dict[str, Any]:
        raw = self._tokenizer.token_bytes(token)
        return {"token": raw.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(raw)}

    def _key(self, token: int) -> str:
        """In this API tokens are keys of an object, so the keys of two partial characters must differ."""
        raw = self._tokenizer.token_bytes(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
