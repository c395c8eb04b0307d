"""Answers for retries of requests: answers that are being generated, which continue when their client leaves, and
finished answers.

    SharedRun (made once, read by any number of clients, each from its first token) --at its end--> KeptAnswer

Only requests whose client gave an id (`Idempotency-Key`) have answers here, because clients can ask again only for
those. The answers are in this process's memory, whose size is bounded. An answer that was dropped from memory is
generated again when it is asked for.
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
from antefix.generation_request import GenerationRequest
from antefix.restore_report import RestoreReport
from antefix.wire import TokenLogprob
from antefix_billing.ledger_files import Settled
from antefix_billing.usage_record import OpenEntry
from antefix_router.generation import Generation, OutputPiece, Sample

if TYPE_CHECKING:
    from antefix_router.open_bill import Bill

Run = Callable[[Generation, float], AsyncGenerator[OutputPiece, None]]

# How many tokens an answer may be ahead of the client that has read most of it. A decode worker allows a sequence the
# same lead.
AHEAD_TOKENS_MAX: Final = 256
# Memory of an answer in addition to its tokens, and of a token's log probability in addition to its alternatives:
# measured, rounded up.
_ANSWER_BYTES: Final = 2048
_LOGPROB_BYTES: Final = 160
_ALTERNATIVE_BYTES: Final = 128
_PIECE_TOKENS: Final = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryConfig:
    """Settings of the answers that are kept for retries of requests with an `Idempotency-Key`."""

    unattended_s: float = setting(
        600.0, "how long an answer is still generated after its client disconnected; 0: not at all", unit="s"
    )
    unattended_max: int = setting(
        64, "most answers that are generated without a client at once; further ones are cancelled"
    )
    kept_answers_bytes: int = setting(
        64 << 20, "memory for finished answers that a retry may get; the oldest are dropped first", unit="bytes"
    )
    kept_answers_s: float = setting(86400.0, "how long a finished answer is kept for a retry", unit="s")

    def __post_init__(self) -> None:
        for name in ("unattended_s", "unattended_max", "kept_answers_bytes", "kept_answers_s"):
            require(getattr(self, name) >= 0, f"{name} must not be negative, is {getattr(self, name)}")


class SharedRun:
    """The answer of one request while it is generated."""

    def __init__(self, bill: Bill) -> None:
        self.generation: Generation = bill.generation
        # The bill of the client that was given most of the answer. The record is written from it.
        self.bill = bill
        self.opening: asyncio.Task[OpenEntry] | None = None
        self.settling: asyncio.Task[Settled | None] | None = None
        self.num_given = 0
        self.num_readers = 0
        # Clients that were admitted and have not begun to read. A client that never begins stays in this number.
        self.num_expected = 0
        self.is_over = False
        self.error: Exception | None = None
        self.waiting_for_a_reader: asyncio.TimerHandle | None = None
        self._furthest = 0
        self._grown = asyncio.Event()
        self._read = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def begin(self, run: Run, timeout_s: float, *, on_end: Callable[[], None]) -> None:
        """Start to generate the answer, once. on_end: called when the answer is complete or has failed."""
        if self._task is None:
            self._task = asyncio.create_task(self._make(run, timeout_s))
            self._task.add_done_callback(lambda _: on_end())

    async def read(self) -> AsyncGenerator[OutputPiece, None]:
        """The answer from its first token on, as it is generated.  Raises:  what making it raised."""
        samples = self.generation.samples
        positions = [0] * len(samples)
        while True:
            new = [(i, sample.emitted[positions[i] : sample.num_wanted]) for i, sample in enumerate(samples)]
            if any(tokens for _, tokens in new):
                for index, tokens in new:
                    positions[index] += len(tokens)
                self._furthest = max(self._furthest, sum(positions))
                self._read.set()
                for index, tokens in new:
                    if tokens:
                        yield OutputPiece(index, np.array(tokens, np.uint32))
            elif self.is_over:
                if self.error is not None:
                    raise self.error
                return
            else:
                await self._grown.wait()

    def give(self, bill: Bill, num_tokens: int) -> bool:
        """Record that a client is about to be given this many tokens. Returns whether no other client has been given as
        many tokens.
        """
        if bill.is_held or num_tokens <= self.num_given:
            return False
        self.num_given, self.bill = num_tokens, bill
        return True

    def cut(self, num_tokens: int) -> None:
        """End the answer (of one output) after this many tokens. Tokens after this end are not part of the answer."""
        (sample,) = self.generation.samples
        sample.end(num_tokens)
        sample.cut()

    def enter(self) -> None:
        self.num_readers += 1
        self.num_expected -= 1
        if self.waiting_for_a_reader is not None:
            self.waiting_for_a_reader.cancel()
            self.waiting_for_a_reader = None

    def leave(self) -> None:
        self.num_readers -= 1
        self._read.set()

    async def stop(self) -> None:
        """Stop making the answer."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _make(self, run: Run, timeout_s: float) -> None:
        try:
            async with contextlib.aclosing(run(self.generation, timeout_s)) as outputs:
                async for _ in outputs:
                    self._tell()
                    while self.num_readers and self.generation.num_emitted - self._furthest >= AHEAD_TOKENS_MAX:
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
class KeptOutput:
    """One output of a finished answer."""

    tokens: Tokens
    logprobs: tuple[TokenLogprob, ...]
    finish_reason: str
    stop_number: int

    @classmethod
    def of(cls, sample: Sample) -> KeptOutput:
        return cls(
            tokens=np.array(sample.emitted, np.uint32),
            logprobs=tuple(sample.logprobs),
            finish_reason=sample.finish_reason,
            stop_number=sample.stop_number,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptAnswer:
    """A finished answer, with the data for its record and its client. started_us: when generating the answer began."""

    request_digest: str
    user: str
    outputs: tuple[KeptOutput, ...]
    num_top_logprobs: int | None
    restore: RestoreReport | None
    output_written_tokens: int
    ttft_s: float
    started_us: int

    @classmethod
    def of(cls, generation: Generation, opened: OpenEntry) -> KeptAnswer:
        return cls(
            request_digest=opened.request_digest,
            user=opened.user,
            outputs=tuple(KeptOutput.of(sample) for sample in generation.samples),
            num_top_logprobs=generation.request.sampling.num_top_logprobs,
            restore=generation.restore,
            output_written_tokens=generation.output_written_tokens,
            ttft_s=generation.ttft_s,
            started_us=opened.started_us,
        )

    @property
    def nbytes(self) -> int:
        a_logprob = _LOGPROB_BYTES + _ALTERNATIVE_BYTES * (self.num_top_logprobs or 0)
        return sum(_ANSWER_BYTES + each.tokens.nbytes + len(each.logprobs) * a_logprob for each in self.outputs)

    def fits(self, request: GenerationRequest, opened: OpenEntry) -> bool:
        """Whether this kept answer belongs to that request, and has everything that the request asks for."""
        return (self.request_digest, self.user, self.num_top_logprobs) == (
            opened.request_digest,
            opened.user,
            request.sampling.num_top_logprobs,
        )

    async def run(self, generation: Generation, timeout_s: float) -> AsyncGenerator[OutputPiece, None]:
        """Give the kept answer's output. This class has the same interface as `Generator.run`, but calls no worker."""
        generation.restore, generation.ttft_s = self.restore, self.ttft_s
        for index, output in enumerate(self.outputs):
            sample = generation.samples[index]
            for start in range(0, len(output.tokens), _PIECE_TOKENS):
                piece = output.tokens[start : start + _PIECE_TOKENS]
                sample.emitted.extend(piece.tolist())
                sample.logprobs.extend(output.logprobs[start : start + _PIECE_TOKENS])
                yield OutputPiece(index, piece)
            sample.finish_reason, sample.stop_number = output.finish_reason, output.stop_number
        generation.output_written_tokens = self.output_written_tokens


class Shelf:
    """Finished answers by request. When the memory for kept answers is full, the oldest answer is dropped first."""

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
        """All kept answers live equally long, so the oldest answer also expires first."""
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
