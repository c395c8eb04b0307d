"""One request, from tokens to its last token: place, prefill, decode, relay, account.

A worker that fails before its part is done is replaced, and the client sees no gap and no repeat: an output is
continued elsewhere from the prompt plus the tokens that the client already has.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field, replace

import numpy as np

from antefix.clients import DecodeClient, Tokens
from antefix.errors import InternalError, Overloaded, Unavailable
from antefix.restore_report import RestoreReport
from antefix.telemetry import begin, span
from antefix.wire import Sampling, TokenLogprob
from antefix_router.keeper import BreakpointPins
from antefix_router.naming import Names, Prompt
from antefix_router.placement.directory import Directory
from antefix_router.placement.sessions import Sessions
from antefix_router.placement.work import Work
from antefix_router.placement.workers import Role, Workers
from antefix_router.prefilling import NUM_MOVES_MAX, Prefilling

log = logging.getLogger("antefix.router")


@dataclass(slots=True)
class Request:
    """One request while it runs. `emitted` are the output tokens that the client has, `logprobs` theirs where they were
    asked for. breakpoints: (prompt tokens, seconds) of prefixes that the client wants kept. session: the client's name
    of the conversation, a hint."""

    request_id: str
    tenant: str
    tokens: Tokens
    sampling: Sampling
    breakpoints: tuple[tuple[int, float], ...] = ()
    session: str = ""
    emitted: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    restore: RestoreReport | None = None
    written_tokens: int = 0
    output_written_tokens: int = 0
    write_error: str = ""
    last_token_at: float = 0.0
    started: float = field(default_factory=time.perf_counter)
    ttft_s: float = 0.0
    finish_reason: str = ""
    stop_number: int = 0


class Generator:
    """Runs requests over the workers."""

    def __init__(
        self,
        prefilling: Prefilling,
        decode: Workers,
        names: Names,
        directory: Directory,
        pins: BreakpointPins,
        sessions: Sessions,
        *,
        between_tokens: Callable[[float, int], None] = lambda seconds, num_tokens: None,
    ) -> None:
        """between_tokens: is told how long a message's tokens were waited for, and how many they are."""
        self._between_tokens = between_tokens
        self._sessions = sessions
        self._pins = pins
        self._prefilling = prefilling
        self._decode = decode
        self._names = names
        self._directory = directory

    async def run(self, request: Request, timeout_s: float) -> AsyncGenerator[Tokens, None]:
        """Output tokens as they come. Afterwards `request` has finish_reason, restore and counts.

        Raises:  what the last worker tried raised.
        """
        if request.sampling.temperature and request.sampling.seed is None:
            # Fixed here, so that a continuation on another worker draws the same numbers.
            request.sampling = replace(request.sampling, seed=secrets.randbits(63))
        # 1. Name the prompt's blocks.
        prompt = self._names.prompt(request.tenant, request.tokens)
        # 2. Prefill, which a short rest leaves to the decode worker.
        prefilled = await self._prefilling.run(
            prompt,
            request_id=request.request_id,
            timeout_s=timeout_s,
            breakpoints=request.breakpoints,
            session=request.session,
        )
        self._pins.pin(prompt.chain, request.breakpoints, owner=prompt.owner)
        handoff, work = b"", prefilled.work
        if prefilled.answer is not None:
            handoff, request.restore = prefilled.answer.handoff, prefilled.answer.restore
            request.written_tokens = request.restore.written_tokens
        # 3. Decode, elsewhere if a worker goes away.
        tried: set[str] = set()
        while not request.finish_reason:
            try:
                async with contextlib.aclosing(
                    self._run_decode(request, prompt, work, handoff, tried, timeout_s)
                ) as outputs:
                    async for tokens in outputs:
                        yield tokens
            except (Unavailable, InternalError, Overloaded) as err:
                if len(tried) >= min(NUM_MOVES_MAX, len(self._decode.workers)):
                    raise
                if len(request.emitted) >= request.sampling.max_tokens:
                    # It died between its last token and its last message; nothing is left to ask anyone for.
                    request.finish_reason = "length"
                    return
                log.warning("request %s moves to another decode worker: %s", request.request_id, err)
                handoff = b""

    def _note_pace(self, request: Request, num_tokens: int) -> None:
        now = time.perf_counter()
        if request.last_token_at:
            self._between_tokens(now - request.last_token_at, num_tokens)
        else:
            request.ttft_s = now - request.started
        request.last_token_at = now

    async def _run_decode(
        self, request: Request, prompt: Prompt, work: Work, handoff: bytes, tried: set[str], timeout_s: float
    ) -> AsyncGenerator[Tokens, None]:
        hint = self._sessions.last(request.tenant, request.session, Role.DECODE)
        with span("place", role="decode", attempt=len(tried) + 1) as placing:
            worker = self._decode.place(
                work, self._directory, prompt.keys, prompt.chain.block_size, frozenset(tried), hint=hint
            )
            placing.set(worker=worker.address)
        tried.add(worker.address)
        self._sessions.note(request.tenant, request.session, Role.DECODE, worker.address)
        self._directory.guess(worker.address, prompt.keys)
        client = worker.client
        assert isinstance(client, DecodeClient)
        tokens = np.concatenate((request.tokens, np.array(request.emitted, np.uint32)))
        part = begin("decode" if request.emitted else "first token", worker=worker.address)
        with self._decode.load(worker, request.sampling.max_tokens), contextlib.ExitStack() as ending:
            ending.callback(lambda: part.end())
            outputs = client.decode(
                tokens,
                request.sampling,
                request_id=request.request_id,
                tenant=request.tenant,
                handoff=handoff,
                num_emitted=len(request.emitted),
                timeout_s=timeout_s,
            )
            async with contextlib.aclosing(outputs):
                async for decoded in outputs:
                    if decoded.restore is not None and request.restore is None:
                        request.restore = decoded.restore
                    if len(decoded.tokens):
                        if not request.last_token_at:
                            part.end()
                            part = begin("decode", worker=worker.address)
                        self._note_pace(request, len(decoded.tokens))
                        request.emitted.extend(int(token) for token in decoded.tokens)
                        request.logprobs.extend(decoded.logprobs)
                        yield decoded.tokens
                    if decoded.finish_reason:
                        request.finish_reason = decoded.finish_reason
                        request.stop_number = decoded.stop_number
                        request.written_tokens += decoded.written_tokens
                        request.output_written_tokens = decoded.written_tokens
                        request.write_error = decoded.write_error
