"""The tokens of answers given lately, so that a resent answer is the very tokens that were generated.

Text to tokens is not always the inverse of tokens to text: a model may spell a word in other pieces than the tokenizer
does, or end in half a character. Then a resent conversation would miss from its first answer on. An answer is found by
all tokens before it and by what the client was told it said. In this process's memory only, least recently used out.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from antefix_router.chat.messages import Message

# 4 bytes a token: 32 MB.
NUM_TOKENS_MAX = 8 << 20
# What an answer takes besides its tokens, counted as so many of them: millions of answers of one token must not fit.
_TOKENS_AN_ANSWER = 64


class AnswerMemory:
    """Answers of all tenants; the cache tenant is part of the name, so nobody meets another's. Thread-safe."""

    def __init__(self, num_tokens_max: int = NUM_TOKENS_MAX) -> None:
        self._num_tokens_max = num_tokens_max
        self._num_tokens = 0
        # Long prompts are encoded, and their answers looked up, in threads.
        self._lock = threading.Lock()
        self._answers: OrderedDict[bytes, bytes] = OrderedDict()

    def put(self, before: Sequence[int], message: Message, tokens: Sequence[int], *, tenant: str) -> None:
        """Remember that after `before` (the prompt) the model wrote `tokens`, which the client saw as `message`."""
        self.keep(answer_name(prefix_state(tenant, before), message), tokens)

    def keep(self, name: bytes, tokens: Sequence[int]) -> None:
        """Remember tokens by a name of `answer_name` or `aside_name`."""
        if not tokens or _cost(4 * len(tokens)) > self._num_tokens_max:
            return
        packed = np.asarray(tokens, "<u4").tobytes()
        with self._lock:
            if (old := self._answers.pop(name, None)) is not None:
                self._num_tokens -= _cost(len(old))
            self._answers[name] = packed
            self._num_tokens += _cost(len(packed))
            while self._num_tokens > self._num_tokens_max:
                _, dropped = self._answers.popitem(last=False)
                self._num_tokens -= _cost(len(dropped))

    def get(self, name: bytes) -> list[int] | None:
        with self._lock:
            found = self._answers.get(name)
            if found is None:
                return None
            self._answers.move_to_end(name)
        return np.frombuffer(found, "<u4").tolist()  # type: ignore[no-any-return]


def _cost(nbytes: int) -> int:
    return nbytes // 4 + _TOKENS_AN_ANSWER


def prefix_state(tenant: str, tokens: Sequence[int]) -> hashlib.blake2b:
    """A hash over tenant and tokens that can be gone on with."""
    state = hashlib.blake2b(digest_size=32, person=b"antefix-answers")
    state.update(len(tenant.encode()).to_bytes(4, "little") + tenant.encode())
    state.update(np.asarray(tokens, "<u4").tobytes())
    return state


def aside_name(prefix: hashlib.blake2b) -> bytes:
    """What was said aside behind this prefix. No part of an answer is as long as the mark says."""
    state = prefix.copy()
    state.update(b"\xff" * 8 + b"aside")
    return state.digest()


def answer_name(prefix: hashlib.blake2b, message: Message) -> bytes:
    """Tool calls count by name and arguments: clients keep those, and some make up ids of their own."""
    state = prefix.copy()
    parts = [message.reasoning, message.content]
    for call in message.tool_calls:
        parts += [call.name, call.arguments]
    for part in parts:
        state.update(len(part.encode("utf-8", "surrogatepass")).to_bytes(8, "little"))
        state.update(part.encode("utf-8", "surrogatepass"))
    return state.digest()
