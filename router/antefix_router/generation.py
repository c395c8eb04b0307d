"""Runs one request from its tokens to the last output token: place the request, prefill, decode, relay the output,
account for it.

A worker that fails before its part is done is replaced, and the client sees no gap and no repeat: an output is
continued elsewhere from the prompt plus the tokens that the client already has. Several outputs for one prompt share
the prompt's prefill.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from antefix.clients import DecodeClient, Tokens
from antefix.errors import InternalError, Overloaded, Unavailable
from antefix.generation_request import GenerationRequest
from antefix.located import Located
from antefix.prompt_marks import marks_of
from antefix.restore_report import RestoreReport
from antefix.sampling import Sampling
from antefix.security.grants import hold
from antefix.telemetry import begin, span
from antefix.usage import Usage
from antefix.wire import TokenLogprob
from antefix_router.breakpoint_pins import BreakpointPins
from antefix_router.decode_stream import DecodeStream, first_work_s
from antefix_router.hedging import HedgeBudget
from antefix_router.merged_streams import merged
from antefix_router.naming import NamedPrompt, PromptNames
from antefix_router.placement.directory import Directory
from antefix_router.placement.moves import Moves
from antefix_router.placement.sessions import Sessions
from antefix_router.placement.work import Work
from antefix_router.placement.workers import WorkerRole, Workers
from antefix_router.prefilling import Prefilling

log = logging.getLogger("antefix.router")

_SEEDS = 1 << 64


class OutputPiece(NamedTuple):
    """A piece of one of the request's outputs."""

    sample: int
    tokens: Tokens


@dataclass(slots=True)
class Sample:
    """One output while it is generated. emitted: the tokens that the client has. logprobs: their log probabilities, if
    they were requested.

    stop_number: the number, from 1, of the stop sequence that ended the output. num_wanted: how many of its tokens are
    wanted, if its reader found the end among them.
    """

    emitted: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str = ""
    stop_number: int = 0
    num_wanted: int | None = None
    last_token_at: float = 0.0

    @property
    def is_ended(self) -> bool:
        return self.num_wanted is not None

    def end(self, num_tokens: int) -> None:
        """The reader has found the output's end after this many tokens. No more are wanted."""
        self.num_wanted = num_tokens

    def cut(self) -> None:
        """The output is over. Tokens after the output's end do not belong to it."""
        del self.emitted[self.num_wanted :]
        del self.logprobs[self.num_wanted :]
        self.finish_reason = "stop"


@dataclass(slots=True)
class Generation:
    """A running request: its settings, and its results so far. prompt_marks: marks of the prompt's blocks, once they
    are named.
    """

    request: GenerationRequest
    samples: list[Sample] = field(init=False)
    restore: RestoreReport | None = None
    prompt_marks: str = ""
    output_written_tokens: int = 0
    write_error: str = ""
    started: float = field(default_factory=time.perf_counter)
    ttft_s: float = 0.0

    def __post_init__(self) -> None:
        self.samples = [Sample() for _ in range(self.request.num_samples)]

    @property
    def tokens(self) -> Tokens:
        return self.request.tokens

    @property
    def num_emitted(self) -> int:
        return sum(len(sample.emitted) for sample in self.samples)

    @property
    def finish_reason(self) -> str:
        """The finish reason of all outputs: "length" if any output was cut off by the limit; empty while one is still
        being generated.
        """
        reasons = {sample.finish_reason for sample in self.samples}
        return "" if "" in reasons else "length" if "length" in reasons else "stop"

    def used(self, num_output: int, reasoning_tokens: int) -> Usage:
        """The usage of the request with this many output tokens. Without a restore report, no prompt token counts as
        worked on.
        """
        ttft_us = round(self.ttft_s * 1e6)
        if self.restore is None:
            return Usage(output_tokens=num_output, reasoning_tokens=reasoning_tokens, ttft_us=ttft_us)
        return self.restore.usage(
            len(self.tokens), output_tokens=num_output, reasoning_tokens=reasoning_tokens, ttft_us=ttft_us
        )

    def sampling(self, index: int) -> Sampling:
        """The sampling of one output. As in vLLM, each output's seed is the previous one's plus 1."""
        sampling = self.request.sampling
        if sampling.seed is None or index == 0:
            return sampling
        return replace(sampling, seed=(sampling.seed + index) % _SEEDS)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Ready:
    """A prompt that is ready for its outputs.  first: set once the prompt's KV is stored or held where all outputs can
    use it.

    located: which of several stores holds which blocks.  has_failed: a prefill worker that answers could not compute
    the prompt.
    """

    prompt: NamedPrompt
    work: Work
    handoff: bytes
    first: asyncio.Event
    located: Located | None = None
    has_failed: bool = False


class Generator:
    """Runs requests on the workers."""

    def __init__(
        self,
        prefilling: Prefilling,
        decode: Workers,
        names: PromptNames,
        directory: Directory,
        pins: BreakpointPins,
        sessions: Sessions,
        *,
        budget: HedgeBudget | None = None,
        between_tokens: Callable[[float, int], None] = lambda seconds, num_tokens: None,
        on_named: Callable[[NamedPrompt], None] = lambda prompt: None,
    ) -> None:
        """budget: limits the requests that move because a worker is late.

        between_tokens: called with the seconds waited for a message's tokens, and with their number.

        on_named: called with each prompt after its blocks have been named.
        """
        self._on_named = on_named
        self._between_tokens = between_tokens
        self._sessions = sessions
        self._budget = budget or HedgeBudget()
        self._pins = pins
        self._prefilling = prefilling
        self._decode = decode
        self._names = names
        self._directory = directory

    async def run(self, generation: Generation, timeout_s: float) -> AsyncGenerator[OutputPiece, None]:
        """The output tokens as they arrive. After the last token, `generation` has the finish reasons, the restore
        report and the counts.

        Raises:  the error of the last worker that was tried.
        """
        request = generation.request
        if request.sampling.temperature and request.sampling.seed is None:
            # The seed is fixed here, so that a continuation on another worker draws the same random numbers.
            request = replace(request, sampling=replace(request.sampling, seed=secrets.randbits(63)))
            generation.request = request
        # 1. Name the prompt's blocks.
        prompt = self._names.prompt(request.cache_tenant, request.tokens, timeout_s=timeout_s)
        hold(prompt.grant)
        generation.prompt_marks = marks_of(prompt.chain.hashes)
        self._on_named(prompt)
        # 2. Prefill. If few tokens are uncached, this is left to the decode worker.
        prefilled = await self._prefilling.run(request, prompt, timeout_s=timeout_s)
        self._pins.pin(prompt.chain, request.breakpoints, owner=prompt.owner)
        handoff, first = b"", asyncio.Event()
        if prefilled.answer is not None:
            handoff, generation.restore = prefilled.answer.handoff, prefilled.answer.restore
            first.set()
        ready = _Ready(
            prompt=prompt,
            work=prefilled.work,
            handoff=handoff,
            first=first,
            located=prefilled.located,
            has_failed=prefilled.has_failed,
        )
        # 3. Decode.
        outputs = [self._run_sample(generation, index, ready, timeout_s) for index in range(request.num_samples)]
        with contextlib.ExitStack() as until_first:
            until_first.enter_context(self._prefilling.left_to_decode(prefilled))
            async with contextlib.aclosing(merged(outputs) if len(outputs) > 1 else outputs[0]) as pieces:
                async for piece in pieces:
                    until_first.close()
                    yield piece

    async def _run_sample(
        self, generation: Generation, index: int, ready: _Ready, timeout_s: float
    ) -> AsyncGenerator[OutputPiece, None]:
        """Make one output. If a worker goes away, another worker continues the output."""
        if index:
            # If the decode worker prefills, the first output does it, and the others use the blocks that it leaves.
            await ready.first.wait()
        sample, handoff = generation.samples[index], ready.handoff
        moves, ends = Moves(self._decode, has_failed=ready.has_failed), time.monotonic() + timeout_s
        while not sample.finish_reason:
            try:
                async with contextlib.aclosing(
                    self._run_decode(generation, index, replace(ready, handoff=handoff), moves, timeout_s)
                ) as outputs:
                    async for tokens in outputs:
                        yield OutputPiece(index, tokens)
                        if sample.is_ended:
                            sample.cut()
                            break
            except (Unavailable, InternalError, Overloaded) as err:
                if len(sample.emitted) >= generation.request.sampling.max_tokens:
                    # The worker died after its last token and before its last message. No tokens are missing.
                    sample.finish_reason = "length"
                    break
                request_id = f"request {generation.request.request_id}"
                if not await moves.may_go_on(err, request_id, ends - time.monotonic()):
                    raise
                log.warning("%s is moved to another decode worker because the first one failed: %s", request_id, err)
                handoff = b""
        ready.first.set()

    def _note_pace(self, generation: Generation, sample: Sample, num_tokens: int) -> None:
        now = time.perf_counter()
        generation.ttft_s = generation.ttft_s or now - generation.started
        if sample.last_token_at:
            self._between_tokens(now - sample.last_token_at, num_tokens)
        sample.last_token_at = now

    async def _run_decode(
        self, generation: Generation, index: int, ready: _Ready, moves: Moves, timeout_s: float
    ) -> AsyncGenerator[Tokens, None]:
        request, sample, prompt = generation.request, generation.samples[index], ready.prompt
        session = request.caller.session
        hint = self._sessions.last(request.cache_tenant, session, WorkerRole.DECODE)
        with span("place", role="decode", attempt=len(moves.tried) + 1) as placing:
            worker = self._decode.place(
                ready.work, self._directory, prompt.keys, prompt.chain.block_size, frozenset(moves.tried), hint=hint
            )
            placing.set(worker=worker.address)
        moves.note(worker)
        self._sessions.note(request.cache_tenant, session, WorkerRole.DECODE, worker.address)
        self._directory.guess(worker.address, prompt.keys)
        client = worker.client
        assert isinstance(client, DecodeClient)
        hold(prompt.grant)
        part = begin("decode" if sample.emitted else "first token", worker=worker.address)
        with self._decode.load(worker, request.sampling.max_tokens), contextlib.ExitStack() as ending:
            ending.callback(lambda: part.end())
            outputs = client.decode(
                request,
                generation.sampling(index),
                handoff=ready.handoff,
                emitted=sample.emitted,
                timeout_s=timeout_s,
                # It is not known where a failed worker has stored the output.
                located=None if sample.emitted else ready.located,
            )
            has_prompt = bool(ready.handoff) and not sample.emitted
            own_s = first_work_s(
                ready.work, has_prompt, worker, self._prefilling.tokens_per_s, bool(request.sampling.grammar)
            )
            stream = DecodeStream(self._decode, worker, moves.tried, self._budget, own_s=own_s)
            async with contextlib.aclosing(outputs):
                while (decoded := await stream.next(outputs)) is not None:
                    ready.first.set()
                    if decoded.restore is not None and generation.restore is None:
                        generation.restore = decoded.restore
                    if len(decoded.tokens):
                        if not sample.emitted:
                            part.end()
                            part = begin("decode", worker=worker.address)
                        self._note_pace(generation, sample, len(decoded.tokens))
                        sample.emitted.extend(int(token) for token in decoded.tokens)
                        sample.logprobs.extend(decoded.logprobs)
                        yield decoded.tokens
                    if decoded.finish_reason:
                        worker.note_speeds(decoded.speeds)
                        sample.finish_reason = decoded.finish_reason
                        sample.stop_number = decoded.stop_number
                        generation.output_written_tokens += decoded.written_tokens
                        generation.write_error = generation.write_error or decoded.write_error
