"""Answers that a retry may have: those that are being made, which go on when their client has left, and finished ones.

    SharedRun (made once, read by any number of clients, each from its first token) --at its end--> KeptAnswer

Only requests whose client named an id (`Idempotency-Key`) are here: nobody could ask for another one again. All of it
lies in this process's memory and is bounded; what is no longer here is made again.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from antefix.clients import Tokens
from antefix.config import require, setting
from antefix.restore_report import RestoreReport
from antefix.wire import TokenLogprob
from antefix_billing.ledger_files import Settled
from antefix_billing.usage_record import OpenEntry
from antefix_router.generation import Request

if TYPE_CHECKING:
    from antefix_router.open_bill import Bill

Run = Callable[[Request, float], AsyncGenerator[Tokens, None]]

# How far an answer may be ahead of the client that has most of it, as a decode worker's sequence may be.
AHEAD_TOKENS_MAX: Final = 256
# What an answer takes beside its tokens, and a token's log probability beside its alternatives: measured, rounded up.
_ANSWER_BYTES: Final = 2048
_LOGPROB_BYTES: Final = 160
_ALTERNATIVE_BYTES: Final = 128
_PIECE_TOKENS: Final = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryConfig:
    """What is held ready for retries of requests with an `Idempotency-Key`."""

    unattended_s: float = setting(600.0, "how long an answer is made on after its client left; 0: not at all", unit="s")
    unattended_max: int = setting(64, "answers that are made on without a client at once; more are cancelled")
    kept_answers_bytes: int = setting(64 << 20, "memory for finished answers; the oldest go first", unit="bytes")
    kept_answers_s: float = setting(86400.0, "how long a finished answer is kept", unit="s")

    def __post_init__(self) -> None:
        for name in ("unattended_s", "unattended_max", "kept_answers_bytes", "kept_answers_s"):
            require(getattr(self, name) >= 0, f"{name} must not be negative, is {getattr(self, name)}")


class SharedRun:
    """One request's answer while it is made."""

    def __init__(self, bill: Bill) -> None:
        self.request: Request = bill.request
        # Whose bill says most of what was given: the record is written from it.
        self.bill = bill
        self.opening: asyncio.Task[OpenEntry] | None = None
        self.settling: asyncio.Task[Settled | None] | None = None
        self.num_given = 0
        self.num_readers = 0
        self.is_over = False
        self.error: Exception | None = None
        self.waiting_for_a_reader: asyncio.TimerHandle | None = None
        self._furthest = 0
        self._grown = asyncio.Event()
        self._read = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def begin(self, run: Run, timeout_s: float, *, on_end: Callable[[], None]) -> None:
        """Start to make the answer, once. on_end: called when it is whole or has failed."""
        if self._task is None:
            self._task = asyncio.create_task(self._make(run, timeout_s))
            self._task.add_done_callback(lambda _: on_end())

    async def read(self) -> AsyncGenerator[Tokens, None]:
        """The answer from its first token on, as it comes. Raises:  what making it raised."""
        position = 0
        while True:
            if piece := self.request.emitted[position:]:
                position += len(piece)
                self._furthest = max(self._furthest, position)
                self._read.set()
                yield np.array(piece, np.uint32)
            elif self.is_over:
                if self.error is not None:
                    raise self.error
                return
            else:
                await self._grown.wait()

    def give(self, bill: Bill, num_tokens: int) -> bool:
        """A client is about to have so many tokens. Returns whether none had as many."""
        if bill.is_held or num_tokens <= self.num_given:
            return False
        self.num_given, self.bill = num_tokens, bill
        return True

    def cut(self, num_tokens: int) -> None:
        """The answer ends here: what was made behind that is no part of it."""
        del self.request.emitted[num_tokens:]
        del self.request.logprobs[num_tokens:]
        self.request.finish_reason = "stop"

    def enter(self) -> None:
        self.num_readers += 1
        if self.waiting_for_a_reader is not None:
            self.waiting_for_a_reader.cancel()
            self.waiting_for_a_reader = None

    def leave(self) -> None:
        self.num_readers -= 1
        self._read.set()

    async def stop(self) -> None:
        """Give up what is not made yet."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _make(self, run: Run, timeout_s: float) -> None:
        try:
            async with contextlib.aclosing(run(self.request, timeout_s)) as outputs:
                async for _ in outputs:
                    self._tell()
                    while self.num_readers and len(self.request.emitted) - self._furthest >= AHEAD_TOKENS_MAX:
                        self._read.clear()
                        await self._read.wait()
        except Exception as err:  # noqa: BLE001 - handed to the readers
            self.error = err
        finally:
            self.is_over = True
            self._tell()

    def _tell(self) -> None:
        self._grown.set()
        self._grown = asyncio.Event()


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptAnswer:
    """A finished answer and what its record and its client are told. started_us: when it began to be made."""

    request_digest: str
    user: str
    tokens: Tokens
    logprobs: tuple[TokenLogprob, ...]
    num_top_logprobs: int | None
    restore: RestoreReport | None
    written_tokens: int
    output_written_tokens: int
    ttft_s: float
    finish_reason: str
    stop_number: int
    started_us: int

    @classmethod
    def of(cls, request: Request, opened: OpenEntry) -> KeptAnswer:
        return cls(
            request_digest=opened.request_digest,
            user=opened.user,
            tokens=np.array(request.emitted, np.uint32),
            logprobs=tuple(request.logprobs),
            num_top_logprobs=request.sampling.num_top_logprobs,
            restore=request.restore,
            written_tokens=request.written_tokens,
            output_written_tokens=request.output_written_tokens,
            ttft_s=request.ttft_s,
            finish_reason=request.finish_reason,
            stop_number=request.stop_number,
            started_us=opened.started_us,
        )

    @property
    def nbytes(self) -> int:
        a_logprob = _LOGPROB_BYTES + _ALTERNATIVE_BYTES * (self.num_top_logprobs or 0)
        return _ANSWER_BYTES + self.tokens.nbytes + len(self.logprobs) * a_logprob

    def fits(self, request: Request, opened: OpenEntry) -> bool:
        """Whether this is the answer to that, with all that is asked for."""
        return (self.request_digest, self.user, self.num_top_logprobs) == (
            opened.request_digest,
            opened.user,
            request.sampling.num_top_logprobs,
        )

    async def run(self, request: Request, timeout_s: float) -> AsyncGenerator[Tokens, None]:
        """As `Generator.run`, without a worker."""
        request.restore, request.written_tokens, request.ttft_s = self.restore, self.written_tokens, self.ttft_s
        for start in range(0, len(self.tokens), _PIECE_TOKENS):
            piece = self.tokens[start : start + _PIECE_TOKENS]
            request.emitted.extend(piece.tolist())
            request.logprobs.extend(self.logprobs[start : start + _PIECE_TOKENS])
            yield piece
        request.output_written_tokens = self.output_written_tokens
        request.finish_reason, request.stop_number = self.finish_reason, self.stop_number


class Shelf:
    """Finished answers by request, the oldest first to go."""

    def __init__(self, bytes_max: int, ttl_s: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.bytes_max = bytes_max
        self.nbytes = 0
        self.num_dropped = 0
        self._ttl_s = ttl_s
        self._clock = clock
        self._kept: OrderedDict[str, tuple[KeptAnswer, float]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def put(self, key: str, answer: KeptAnswer) -> None:
        self._take(key)
        self._kept[key] = (answer, self._clock() + self._ttl_s)
        self.nbytes += answer.nbytes
        self._drop()

    def get(self, key: str) -> KeptAnswer | None:
        self._drop()
        kept = self._kept.get(key)
        return kept[0] if kept is not None else None

    def _drop(self) -> None:
        """All live equally long, so the oldest is also the first whose time is over."""
        now = self._clock()
        while self._kept:
            key, (_, until) = next(iter(self._kept.items()))
            if self.nbytes <= self.bytes_max and until > now:
                return
            self.num_dropped += self.nbytes > self.bytes_max
            self._take(key)

    def _take(self, key: str) -> None:
        if (kept := self._kept.pop(key, None)) is not None:
            self.nbytes -= kept[0].nbytes
