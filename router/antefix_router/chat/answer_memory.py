"""Remembers the tokens of recent answers, so that a resent answer becomes exactly the tokens that were generated.

Tokenizing an answer's text does not always give back the model's tokens: the model may split a word differently than
the tokenizer, or stop within a character. Without this memory, the resent conversation would miss from its first answer
on. An answer is found by all tokens before it and by the message that the client was given. Each process has its own
memory of answers, which drops the least recently used ones.

Many clients of OpenAI's chat API cannot store reasoning and send an answer back without it. If the chat format keeps
reasoning, such an answer would have other tokens, and the prompt would miss from there on. So an answer is looked up
without its reasoning, and put back with it.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from antefix_router.chat.messages import Message

# 32 MB, at 4 bytes per token.
NUM_TOKENS_MAX = 8 << 20
# The overhead of an answer in memory, counted in tokens. Without it, millions of answers of one token each would be
# kept.
_TOKENS_A_NAME = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundAnswer:
    """The tokens of an answer. is_restored: they hold reasoning that the client did not send back."""

    tokens: list[int]
    is_restored: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class _Kept:
    """said: the name of the answer without its reasoning, if it has reasoning."""

    packed: bytes
    said: bytes | None

    @property
    def tokens(self) -> list[int]:
        return np.frombuffer(self.packed, "<u4").tolist()  # type: ignore[no-any-return]

    @property
    def cost(self) -> int:
        return _cost(len(self.packed), num_names=1 + (self.said is not None))


class AnswerMemory:
    """Answers of all tenants. The cache tenant is part of an answer's name, so that no tenant gets another tenant's
    answer. Thread-safe.
    """

    def __init__(self, num_tokens_max: int = NUM_TOKENS_MAX) -> None:
        self._num_tokens_max = num_tokens_max
        self._num_tokens = 0
        # A lock, because threads encode long prompts and look up their answers.
        self._lock = threading.Lock()
        self._answers: OrderedDict[bytes, _Kept] = OrderedDict()
        # Maps an answer's name without reasoning to the last such answer with reasoning.
        self._said: dict[bytes, bytes] = {}

    def put(self, before: Sequence[int], message: Message, tokens: Sequence[int], *, tenant: str) -> None:
        """Record that after `before` (the prompt) the model wrote `tokens`, which the client was shown as `message`."""
        prefix = prefix_state(tenant, before)
        said = answer_name(prefix, replace(message, reasoning="")) if message.reasoning else None
        self._keep(answer_name(prefix, message), tokens, said)

    def keep_aside(self, name: bytes, tokens: Sequence[int]) -> None:
        """Remember tokens under a name made by `aside_name`."""
        self._keep(name, tokens, None)

    def aside(self, name: bytes) -> list[int] | None:
        with self._lock:
            kept = self._touched(name)
        return None if kept is None else kept.tokens

    def _keep(self, name: bytes, tokens: Sequence[int], said: bytes | None) -> None:
        kept = _Kept(packed=np.asarray(tokens, "<u4").tobytes(), said=said)
        if not tokens or kept.cost > self._num_tokens_max:
            return
        with self._lock:
            self._drop(name)
            self._answers[name] = kept
            self._num_tokens += kept.cost
            if said is not None:
                self._said[said] = name
            while self._num_tokens > self._num_tokens_max:
                self._drop(next(iter(self._answers)))

    def get(self, prefix: hashlib.blake2b, message: Message) -> FoundAnswer | None:
        """The tokens that the model generated when it wrote this message after this prefix."""
        name = answer_name(prefix, message)
        with self._lock:
            if is_restored := name not in self._answers and not message.reasoning:
                name = self._said.get(name, name)
            kept = self._touched(name)
        return None if kept is None else FoundAnswer(tokens=kept.tokens, is_restored=is_restored)

    def _touched(self, name: bytes) -> _Kept | None:
        kept = self._answers.get(name)
        if kept is not None:
            self._answers.move_to_end(name)
        return kept

    def _drop(self, name: bytes) -> None:
        kept = self._answers.pop(name, None)
        if kept is None:
            return
        self._num_tokens -= kept.cost
        if kept.said is not None and self._said.get(kept.said) == name:
            del self._said[kept.said]


def _cost(nbytes: int, *, num_names: int) -> int:
    return nbytes // 4 + num_names * _TOKENS_A_NAME


def prefix_state(tenant: str, tokens: Sequence[int]) -> hashlib.blake2b:
    """A hash over tenant and tokens, to which more tokens can be added."""
    state = hashlib.blake2b(digest_size=32, person=b"antefix-answers")
    state.update(len(tenant.encode()).to_bytes(4, "little") + tenant.encode())
    state.update(np.asarray(tokens, "<u4").tobytes())
    return state


def aside_name(prefix: hashlib.blake2b) -> bytes:
    """The name of the request-dependent text (`Aside`) after this prefix. The name's length mark is longer than any
    part of an answer, so it cannot equal an answer's name.
    """
    state = prefix.copy()
    state.update(b"\xff" * 8 + b"aside")
    return state.digest()


def answer_name(prefix: hashlib.blake2b, message: Message) -> bytes:
    """The name of an answer that follows a prefix. Of a tool call, only name and arguments count in the answer's name:
    clients keep those, and some replace the ids. Many clients parse the arguments and write them again, so arguments
    that are equal as JSON count as equal.
    """
    state = prefix.copy()
    parts = [message.reasoning, message.content]
    for call in message.tool_calls:
        parts += [call.name, _canonical(call.arguments)]
    for part in parts:
        state.update(len(part.encode("utf-8", "surrogatepass")).to_bytes(8, "little"))
        state.update(part.encode("utf-8", "surrogatepass"))
    return state.digest()


def _canonical(arguments: str) -> str:
    """All spellings of the same JSON give the same text. A text that is not JSON stays as it is."""
    try:
        return json.dumps(json.loads(arguments, parse_float=_number), sort_keys=True)
    except (ValueError, RecursionError):
        return arguments


def _number(text: str) -> float | int:
    """Clients in JavaScript write the number 1.0 as 1."""
    number = float(text)
    return int(number) if number.is_integer() else number
