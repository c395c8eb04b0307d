"""One running answer in a form for all APIs: pieces of text, reasoning and calls, and how it ended."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from antefix.clients import Tokens
from antefix.restore_report import RestoreReport
from antefix.tokenizer import Tokenizer
from antefix_billing.usage_record import UsageRecord
from antefix_router.chat.answer_memory import AnswerMemory
from antefix_router.chat.chat_formats import OutputParser
from antefix_router.chat.messages import ChatRole, Delta, Message, ToolCall
from antefix_router.front import Front
from antefix_router.gateway.cache_report import cache_details, cache_headers
from antefix_router.gateway.calls import Calls
from antefix_router.gateway.logprob_fields import LogprobWriter, SpokenToken
from antefix_router.open_bill import Bill


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """reason: "stop", "length" or "tool_calls". stop: the stop text that ended the answer, if one did."""

    reason: str
    stop: str | None
    record: UsageRecord
    wants_details: bool = False

    def usage(self, form: Callable[[UsageRecord], dict[str, Any]]) -> dict[str, Any]:
        """The usage in a provider's form, with the cache report if the client asked for it."""
        details = {"antefix": cache_details(self.record)} if self.wants_details else {}
        return {**form(self.record), **details}

    @property
    def headers(self) -> dict[str, str]:
        """The fields at the head of a complete answer."""
        return cache_headers(self.record)


class Output:
    """Runs one admitted request and reads its answer."""

    def __init__(
        self,
        front: Front,
        bill: Bill,
        parser: OutputParser,
        *,
        stop: Sequence[str],
        memory: AnswerMemory | None,
        strict: Mapping[str, Any] | None = None,
        index: int = 0,
        tells_logprobs: bool = True,
    ) -> None:
        """strict: schemas of the tools whose calls must satisfy their schema. index: the number of this output within
        the request.

        tells_logprobs: whether the client gets the log probabilities, if there are any.
        """
        self._front = front
        self._bill = bill
        self._sample = bill.generation.samples[index]
        self._tells_logprobs = tells_logprobs
        self._text = front.tokenizer.stream()
        self._parser = parser
        self._stop = StopTexts(stop)
        self._memory = memory
        self._calls = Calls(strict or {})
        self.is_held = False
        self.wants_details = False
        self.content = ""
        self.reasoning = ""
        self.num_output_tokens = 0
        self.logprobs = LogprobWriter(front.tokenizer)
        self._spoken: list[SpokenToken] = []

    @property
    def tool_calls(self) -> list[ToolCall]:
        """The calls that are complete."""
        return self._calls.done

    @property
    def request_id(self) -> str:
        return self._bill.generation.request.request_id

    @property
    def restore(self) -> RestoreReport | None:
        """Where the prompt's KV came from (memory, a store, or computed). This report is known from the first
        delta on.
        """
        return self._bill.generation.restore

    @property
    def num_prompt_tokens(self) -> int:
        return len(self._bill.generation.tokens)

    @property
    def total_logprob(self) -> float:
        """The sum of the log probabilities of all tokens, if they were requested."""
        return sum(each.logprob for each in self._sample.logprobs)

    @property
    def has_ended(self) -> bool:
        """Whether a stop text has ended the answer. Text after the stop text is not part of the answer."""
        return self._stop.found is not None

    async def deltas(self, timeout_s: float, *, held: bool = False) -> AsyncGenerator[Delta, None]:
        """The pieces of the answer as they arrive. Closing the iterator early cancels the request; after its end,
        `ended` is known.

        held: no part of the answer is sent before all of the answer is there.
        """
        self._bill.is_held = self.is_held = held
        async with contextlib.aclosing(self._front.run(self._bill, timeout_s)) as pieces:
            async for _, tokens in pieces:
                for delta in self.read(tokens):
                    yield delta
                if self.has_ended:
                    self._bill.end_here(self.num_output_tokens)
                    break
        for delta in self.finish():
            yield delta

    def read(self, tokens: Tokens) -> list[Delta]:
        """Read tokens one after the other, because each belongs to the parser's state when it arrives."""
        deltas: list[Delta] = []
        for token in tokens:
            if self.has_ended:
                break
            self._note(int(token))
            may_stop = self.num_output_tokens > self._bill.generation.request.sampling.min_tokens
            deltas += self._take(self._stop.push(self._text.push([int(token)]), may_stop=may_stop))
        return deltas

    def finish(self) -> list[Delta]:
        """The output is over. Text that was held back is now passed on as ordinary text."""
        deltas: list[Delta] = []
        if not self.has_ended:
            deltas += self._take(self._stop.push(self._text.finish()) + self._stop.finish())
        deltas += self._keep(self._parser.finish())
        self._remember()
        return deltas

    def ended(self) -> Ended:
        """How the answer ended.  Raises:  AssertionError: `deltas` has not ended."""
        sample = self._sample
        stop = self._stop.found
        if stop is None and sample.stop_number:
            stop = self._stop.texts[sample.stop_number - 1]
        reason = "length" if sample.finish_reason == "length" and stop is None else "stop"
        if self.tool_calls and reason == "stop":
            reason = "tool_calls"
        return Ended(reason=reason, stop=stop, record=self._bill.record, wants_details=self.wants_details)

    def new_logprobs(self) -> list[SpokenToken]:
        """The tokens of the text that was sent since the last call; empty if log probabilities were not requested."""
        is_over = self._stop.is_finished
        given = [each for each in self._spoken if is_over or each.start < self._stop.num_given]
        self._spoken = self._spoken[len(given) :]
        return given

    def _note(self, token: int) -> None:
        in_reasoning, logprobs = self._parser.in_reasoning, self._sample.logprobs
        if self._tells_logprobs and self.num_output_tokens < len(logprobs):
            logprob = logprobs[self.num_output_tokens]
            self._spoken.append(
                SpokenToken(token=token, start=self._stop.num_taken, is_reasoning=in_reasoning, logprob=logprob)
            )
        self.num_output_tokens += 1
        if in_reasoning:
            self._bill.reasoning_tokens += 1

    def _take(self, text: str) -> list[Delta]:
        return self._keep(self._parser.push(text)) if text else []

    def _keep(self, parsed: list[Delta]) -> list[Delta]:
        deltas: list[Delta] = []
        for delta in parsed:
            deltas += [delta] if delta.call is None else self._calls.push(delta.call)
        for delta in deltas:
            self.content += delta.content
            self.reasoning += delta.reasoning
        return deltas

    def _remember(self) -> None:
        if self._memory is None or self.has_ended:
            return
        request, calls = self._bill.generation.request, [*self.tool_calls]
        if self._calls.cut_off is not None and not self.is_held:
            calls.append(self._calls.cut_off)
        message = Message(
            role=ChatRole.ASSISTANT, content=self.content, reasoning=self.reasoning, tool_calls=tuple(calls)
        )
        self._memory.put(request.tokens.tolist(), message, self._sample.emitted, tenant=request.cache_tenant)


class StopTexts:
    """Finds stop texts in the answer. The decode worker searches by tokens, and misses a stop text that the model
    spells with other tokens than the tokenizer. Text that may begin a stop text is held back.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        self.texts = tuple(texts)
        self.found: str | None = None
        self.is_finished = False
        self.num_taken = 0
        self._held = ""

    @property
    def num_given(self) -> int:
        """Characters that were passed on."""
        return self.num_taken - len(self._held)

    def push(self, text: str, *, may_stop: bool = True) -> str:
        """may_stop: whether a stop text that ends within `text` may end the answer."""
        if self.found is not None:
            return ""
        self.num_taken += len(text)
        if not self.texts:
            return text
        num_held = len(self._held)
        self._held += text
        places = []
        for stop in self.texts if may_stop else ():
            # A stop text that ended earlier was passed on at that time.
            place = self._held.find(stop, max(0, num_held - len(stop) + 1))
            places += [(place, stop)] if place >= 0 else []
        if places:
            place, self.found = min(places)
            shown, self._held = self._held[:place], self._held[place:]
            return shown
        keep = max((_num_begun(self._held, stop) for stop in self.texts), default=0)
        shown = self._held[: len(self._held) - keep]
        self._held = self._held[len(self._held) - keep :]
        return shown

    def finish(self) -> str:
        """The answer ended without a stop text."""
        self.is_finished = True
        text, self._held = self._held, ""
        return text


def _num_begun(text: str, stop: str) -> int:
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)


def stop_tokens(tokenizer: Tokenizer, stop: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """The token sequences of the stop texts, for the decode worker. At a stop sequence, the worker ends the output
    without asking the router, and stores it.
    """
    return tuple(tuple(tokenizer.encode_plain(text)) for text in stop)
