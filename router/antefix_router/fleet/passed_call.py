"""One request that is passed to a worker: what its client sent, and what the worker reports. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from antefix.clients import Tokens
from antefix.errors import StepFailed
from antefix.miss_reason import MissReason
from antefix.usage import Evidence, Usage
from antefix_router.generation import Generation

CHAT: Final = "/v1/chat/completions"
COMPLETIONS: Final = "/v1/completions"
PLAN: Final = "foreign"


@dataclass(frozen=True, slots=True, kw_only=True)
class PassedCall:
    """path, body: as they are sent to the worker. scope: the tenant's cache and the adapter. tokens: the prompt's
    tokens; None if they are not known. num_prompt_tokens_about: a lower bound of their number if they are not known.

    affinity: a value that chooses the worker of a prompt without block names if nothing else decides. wants_usage,
    wants_running_usage: the parts of the usage that the client asked for in its stream.
    """

    path: str
    body: Mapping[str, Any]
    model: str
    scope: str
    tokens: Tokens | None
    num_prompt_tokens_about: int
    stream: bool
    wants_usage: bool
    wants_running_usage: bool
    affinity: int = 0

    @property
    def num_prompt_tokens(self) -> int:
        return self.num_prompt_tokens_about if self.tokens is None else len(self.tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reported:
    """A worker's counts for one answer. cached_tokens: None if the worker does not report cached tokens. is_whole: the
    counts are those at the answer's end.
    """

    prompt_tokens: int
    output_tokens: int
    cached_tokens: int | None = None
    reasoning_tokens: int = 0
    is_whole: bool = False

    @classmethod
    def read(cls, usage: Any, *, is_whole: bool) -> Reported | None:
        """Read the `usage` of an answer or of a piece of an answer; None if it holds no counts."""
        if not isinstance(usage, dict):
            return None
        prompt, output = _count(usage.get("prompt_tokens")), _count(usage.get("completion_tokens"))
        if prompt is None:
            return None
        details, of_output = usage.get("prompt_tokens_details"), usage.get("completion_tokens_details")
        cached = _count(details.get("cached_tokens")) if isinstance(details, dict) else None
        reasoning = _count(of_output.get("reasoning_tokens")) if isinstance(of_output, dict) else None
        reasoning = reasoning if reasoning is not None else _count(usage.get("reasoning_tokens"))
        return cls(
            prompt_tokens=prompt,
            output_tokens=output or 0,
            cached_tokens=None if cached is None else min(cached, prompt),
            reasoning_tokens=min(reasoning or 0, output or 0),
            is_whole=is_whole,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """What the directory said when the request was placed, in tokens. best: the hit at the engine that holds most."""

    here: int = 0
    best: int = 0
    block_size: int = 1
    num_tokens: int = 0
    is_named: bool = False
    was_evicted: bool = False

    def miss_reason(self, hit: int) -> MissReason:
        """Why no more than this many tokens hit, as far as the fleet's events show."""
        if not self.is_named:
            return MissReason.UNKNOWN
        if self.most == 0:
            return MissReason.BELOW_MINIMUM
        if hit >= self.most:
            return MissReason.NONE
        if self.here > hit:
            return MissReason.LOST_HIT
        if self.best > hit:
            return MissReason.OTHER_WORKER
        return MissReason.EVICTED if self.was_evicted else MissReason.FIRST_SEEN

    @property
    def most(self) -> int:
        """The largest possible hit. Engines always compute the last token, and so its whole block."""
        return (self.num_tokens - 1) // self.block_size * self.block_size if self.num_tokens else 0


@dataclass(slots=True)
class PassedGeneration(Generation):
    """A request that another engine's worker is answering.  num_pieces: pieces of output so far, used if the worker
    does not count tokens.

    answer: a complete answer that is not a stream.  events: events of a stream that are ready for the client.
    last: the event with the usage that the client asked for. The last event is sent after the record of the request is
    written.
    """

    call: PassedCall = field(kw_only=True)
    worker: str = ""
    expected: Expected = field(default_factory=Expected)
    reported: Reported | None = None
    num_pieces: int = 0
    has_given: bool = False
    reasons: dict[int, str] = field(default_factory=dict)
    answer: dict[str, Any] | None = None
    events: list[str] = field(default_factory=list)
    last: dict[str, Any] | None = None

    @property
    def num_emitted(self) -> int:
        """The number of output tokens, as the worker counts them. If the worker gives no count, each piece of output
        counts as one token.
        """
        return self.num_pieces if self.reported is None else max(self.reported.output_tokens, 0)

    @property
    def finish_reason(self) -> str:
        return "length" if "length" in self.reasons.values() else "stop"

    def take_answer(self, answer: dict[str, Any]) -> None:
        """Take over a complete answer from the worker."""
        self.answer = answer
        self.reported = Reported.read(answer.get("usage"), is_whole=True)
        self._note_choices(answer)

    def take_piece(self, data: str) -> None:
        """Take over one event of the worker's stream. Raises: Unavailable: the worker reports that it cannot continue
        the answer.
        """
        if (event := self._passed(data)) is not None:
            self.events.append(event)

    def taken(self) -> list[str]:
        """The events of the stream that arrived since the last call."""
        events, self.events = self.events, []
        return events

    def _passed(self, data: str) -> str | None:
        """The part of an event that the client gets: all of the event, or all but a usage that only the router asked
        for.
        None: nothing.
        """
        try:
            piece = json.loads(data)
        except (ValueError, RecursionError):
            return data
        if not isinstance(piece, dict):
            return data
        if isinstance(error := piece.get("error"), dict):
            raise StepFailed(f"{self.worker} broke off: {error.get('message', error)}"[:500])
        choices = piece.get("choices")
        is_last = choices == []
        self.reported = Reported.read(piece.get("usage"), is_whole=is_last) or self.reported
        self.num_pieces += len(choices) if isinstance(choices, list) else 0
        self._note_choices(piece)
        if "usage" not in piece:
            return data
        if is_last:
            self.last = piece if self.call.wants_usage else None
            return None
        if self.call.wants_running_usage:
            return data
        if self.call.wants_usage:
            piece["usage"] = None
        else:
            del piece["usage"]
        return json.dumps(piece, ensure_ascii=False, separators=(",", ":"))

    def used(self, num_output: int, reasoning_tokens: int) -> Usage:
        """The usage of the answer, as the worker reports it. If the answer broke off before the worker's report, the
        expected hit is used.
        """
        said = self.reported
        ttft_us = round(self.ttft_s * 1e6)
        if said is None:
            return Usage(output_tokens=num_output, ttft_us=ttft_us, worker=self.worker)
        hit = said.cached_tokens
        if hit is None:
            hit = 0 if said.is_whole else min(self.expected.here, said.prompt_tokens)
        return Usage(
            prompt_tokens=said.prompt_tokens,
            cache_hit_tokens=hit,
            hit_memory_tokens=hit,
            output_tokens=num_output,
            reasoning_tokens=min(said.reasoning_tokens, num_output),
            restore_plan=PLAN,
            miss_reason=self.expected.miss_reason(hit),
            ttft_us=ttft_us,
            evidence=Evidence.REPORTED if said.is_whole else Evidence.EXPECTED,
            expected_hit_tokens=self.expected.here,
            worker=self.worker,
        )

    def _note_choices(self, piece: dict[str, Any]) -> None:
        choices = piece.get("choices")
        for choice in choices if isinstance(choices, list) else ():
            if isinstance(choice, dict) and isinstance(choice.get("finish_reason"), str):
                self.reasons[choice.get("index", 0)] = choice["finish_reason"]


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 31 else None
