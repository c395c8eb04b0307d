"""Follows a grammar token by token, and keeps the grammars that this worker has compiled.

A grammar is compiled in a thread, a few at a time, with a deadline. The grammar engine's own limits
(antefix/grammar.py) reject grammars that are too large. A matcher that fails ends its own sequence only.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import llguidance
import llguidance.numpy as masks
import numpy as np
import numpy.typing as npt

from antefix.errors import InvalidRequest, Overloaded
from antefix.grammar import Vocabulary, reason

# A simple grammar takes some 50 KB. An agent usually has one grammar, or one for each set of tools.
NUM_KEPT_MAX = 128
NUM_AT_ONCE = 2
READY_S_MAX = 10.0


class Matcher:
    """The position of one output in its grammar. See `antefix_decode.token_choice.Constraint`."""

    def __init__(self, matcher: llguidance.LLMatcher, vocab_size: int) -> None:
        self._matcher = matcher
        self._bits = masks.allocate_token_bitmask(1, vocab_size)
        self.is_over = False

    def mask(self, logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Raises:  InvalidRequest: the grammar has become too large to continue with."""
        allowed = np.unpackbits(self.allowed().view(np.uint8), bitorder="little")[: len(logits)]
        return np.where(allowed.view(np.bool_), logits, np.float32(-np.inf))

    def allowed(self) -> npt.NDArray[np.int32]:
        """Raises:  InvalidRequest: the grammar has become too large to continue with."""
        masks.fill_next_token_bitmask(self._matcher, self._bits)
        self._check()
        bits: npt.NDArray[np.int32] = self._bits[0].copy()
        return bits

    def push(self, token: int) -> None:
        """Raises:  InvalidRequest: the grammar does not allow this token next."""
        self._matcher.consume_token(token)
        self._check()
        self.is_over = self._matcher.is_stopped()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise InvalidRequest(f"the output format is too complex: {reason(self._matcher.get_error())}")


class Grammars:
    """Compiles each grammar once, and creates a matcher for each output."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._ready: OrderedDict[bytes, llguidance.LLMatcher] = OrderedDict()
        # Separate threads: work that missed its deadline runs on, and asyncio's own threads serve files and host names.
        self._threads = ThreadPoolExecutor(NUM_AT_ONCE, thread_name_prefix="antefix-grammar")
        self._turns = asyncio.Semaphore(NUM_AT_ONCE)

    async def matcher(self, grammar: str, emitted: Sequence[int] = ()) -> Matcher:
        """A matcher that has already read `emitted`, the part of the output that was sent before.

        Raises:  InvalidRequest: not a grammar, too large a grammar, or `emitted` does not follow it.
        """
        name = hashlib.blake2b(grammar.encode(), digest_size=16).digest()
        ready = self._ready.get(name)
        if ready is None:
            ready = await self._make(grammar)
            self._ready[name] = ready
            while len(self._ready) > NUM_KEPT_MAX:
                self._ready.popitem(last=False)
        self._ready.move_to_end(name)
        matcher = Matcher(ready.deep_copy(), self._vocabulary.size)
        for token in emitted:
            matcher.push(token)
        return matcher

    def _ended(self, work: asyncio.Future[llguidance.LLMatcher]) -> None:
        self._turns.release()
        if not work.cancelled():
            # Read the exception, or asyncio would log it as never retrieved if nobody waits for it any more.
            work.exception()

    async def _make(self, grammar: str) -> llguidance.LLMatcher:
        work: asyncio.Future[llguidance.LLMatcher] | None = None
        try:
            async with asyncio.timeout(READY_S_MAX):
                await self._turns.acquire()
                # A thread cannot be stopped, so its place stays taken until it ends, however long that takes.
                work = asyncio.get_running_loop().run_in_executor(self._threads, self._vocabulary.matcher, grammar)
                work.add_done_callback(self._ended)
                ready = await asyncio.shield(work)
        except TimeoutError as err:
            if work is None:
                raise Overloaded("too many other output formats are being compiled", retry_after_s=READY_S_MAX) from err
            raise InvalidRequest(f"the output format takes more than {READY_S_MAX:g} s to compile") from err
        if ready.is_error():
            raise InvalidRequest(f"the output format cannot be used: {reason(ready.get_error())}")
        return ready
