"""One running answer, as all APIs see it: deltas of text, reasoning and calls, and how it ended."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from antefix.clients import Tokens
from antefix.restore_report import RestoreReport
from antefix.tokenizer import TextStream, Tokenizer
from antefix_billing.usage_record import UsageRecord
from antefix_router.chat.answer_memory import AnswerMemory
from antefix_router.chat.chat_formats import OutputParser
from antefix_router.chat.messages import Delta, Message, Role, ToolCall
from antefix_router.front import Front
from antefix_router.gateway.cache_report import cache_details, cache_headers
from antefix_router.gateway.calls import Calls
from antefix_router.gateway.logprob_fields import LogprobWriter, SpokenToken
from antefix_router.open_bill import Bill


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """reason: "stop", "length" or "tool_calls".  stop: the stop text that ended it, if one did."""

    reason: str
    stop: str | None
    record: UsageRecord
    wants_details: bool = False

    def usage(self, form: Callable[[UsageRecord], dict[str, Any]]) -> dict[str, Any]:
        """In a provider's form; with what the cache did, where the client wants it."""
        details = {"antefix": cache_details(self.record)} if self.wants_details else {}
        return {**form(self.record), **details}

    @property
    def headers(self) -> dict[str, str]:
        """What a whole answer's head says of it."""
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
    ) -> None:
        """strict: schemas of the tools whose calls must keep to them."""
        self._front = front
        self._bill = bill
        self._parser = parser
        self._stop = _StopTexts(stop)
        self._memory = memory
        self._calls = Calls(strict or {})
        self._is_held = False
        self.wants_details = False
        self.content = ""
        self.reasoning = ""
        self.num_output_tokens = 0
        self.logprobs = LogprobWriter(front.tokenizer)
        self._spoken: list[SpokenToken] = []

    @property
    def tool_calls(self) -> list[ToolCall]:
        """Those that are whole."""
        return self._calls.done

    @property
    def request_id(self) -> str:
        return self._bill.request.request_id

    @property
    def restore(self) -> RestoreReport | None:
        """Where the prompt's KV came from; there from the first delta on."""
        return self._bill.request.restore

    @property
    def num_prompt_tokens(self) -> int:
        return len(self._bill.request.tokens)

    async def deltas(self, timeout_s: float, *, held: bool = False) -> AsyncGenerator[Delta, None]:
        """What the answer grows by. Closing this early cancels the request; after its end `ended` may be asked for.

        held: nothing of it goes out before all of it is there.
        """
        self._bill.is_held = self._is_held = held
        text = self._front.tokenizer.stream()
        async with contextlib.aclosing(self._front.run(self._bill, timeout_s)) as outputs:
            async for tokens in outputs:
                for delta in self._read(tokens, text):
                    yield delta
                if self._stop.found is not None:
                    self._bill.end_here(self.num_output_tokens)
                    break
        if self._stop.found is None:
            rest = self._stop.push(text.finish()) + self._stop.finish()
            for delta in self._take(rest):
                yield delta
        for delta in self._keep(self._parser.finish()):
            yield delta
        self._remember()

    def ended(self) -> Ended:
        """Raises:  AssertionError: `deltas` has not ended."""
        request = self._bill.request
        stop = self._stop.found
        if stop is None and request.stop_number:
            stop = self._stop.texts[request.stop_number - 1]
        reason = "length" if request.finish_reason == "length" and stop is None else "stop"
        if self.tool_calls and reason == "stop":
            reason = "tool_calls"
        return Ended(reason=reason, stop=stop, record=self._bill.record, wants_details=self.wants_details)

    def new_logprobs(self) -> list[SpokenToken]:
        """The tokens of the text that was given out since this was last asked; none where they were not asked for."""
        is_over = self._stop.is_finished
        given = [each for each in self._spoken if is_over or each.start < self._stop.num_given]
        self._spoken = self._spoken[len(given) :]
        return given

    def _read(self, tokens: Tokens, text: TextStream) -> list[Delta]:
        """One token after the other: each belongs to what the parser was in when it came."""
        deltas: list[Delta] = []
        for token in tokens:
            if self._stop.found is not None:
                break
            self._note(int(token))
            deltas += self._take(self._stop.push(text.push([int(token)])))
        return deltas

    def _note(self, token: int) -> None:
        in_reasoning, logprobs = self._parser.in_reasoning, self._bill.request.logprobs
        if self.num_output_tokens < len(logprobs):
            logprob = logprobs[self.num_output_tokens]
            self._spoken.append(
                SpokenToken(token=token, start=self._stop.num_taken, is_reasoning=in_reasoning, logprob=logprob)
            )
        self.num_output_tokens += 1
        if in_reasoning:
            self._bill.reasoning_tokens = self.num_output_tokens

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
        if self._memory is None or self._stop.found is not None:
            return
        request, calls = self._bill.request, [*self.tool_calls]
        if self._calls.cut_off is not None and not self._is_held:
            calls.append(self._calls.cut_off)
        message = Message(role=Role.ASSISTANT, content=self.content, reasoning=self.reasoning, tool_calls=tuple(calls))
        self._memory.put(request.tokens.tolist(), message, request.emitted, tenant=request.tenant)


class _StopTexts:
    """Looks for stop texts in the answer: a text may be spelt in other tokens than the tokenizer gives for it, and then
    the decode worker does not see it. Text that may begin one is held back."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.texts = tuple(texts)
        self.found: str | None = None
        self.is_finished = False
        self.num_taken = 0
        self._held = ""

    @property
    def num_given(self) -> int:
        """Characters that were let through."""
        return self.num_taken - len(self._held)

    def push(self, text: str) -> str:
        if self.found is not None:
            return ""
        self.num_taken += len(text)
        if not self.texts:
            return text
        self._held += text
        places = [(self._held.find(stop), stop) for stop in self.texts if stop in self._held]
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
    """Stop texts as the decode worker looks for them; it ends at them without a round trip, and stores the output."""
    return tuple(tuple(tokenizer.encode_plain(text)) for text in stop)
