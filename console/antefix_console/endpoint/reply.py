"""One request to an endpoint, and its answer."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """prompt: the text of one user message.  max_tokens: limit on the answer's tokens.

    user, salt: the request's `user` and `cache_salt` fields; empty: not sent.
    logprobs: request the log probability of each token of the answer (OpenAI dialects).
    idempotency_key: sent as the Idempotency-Key header; empty: not sent.
    breakpoint: mark the prompt as a prefix to be cached (only Anthropic's dialect needs it; the others ignore it).
    """

    prompt: str
    max_tokens: int = 1
    user: str = ""
    salt: str = ""
    idempotency_key: str = ""
    logprobs: bool = False
    breakpoint: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportedUsage:
    """Token counts that the endpoint reports. prompt_tokens: all of the prompt, including hits, in every dialect.

    reports_hits: the endpoint reports hit tokens; if not, cached_tokens is 0.
    missed_tokens: missed tokens, if the endpoint reports them itself (DeepSeek's `prompt_cache_miss_tokens`); else
    None.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    written_tokens: int = 0
    output_tokens: int = 0
    missed_tokens: int | None = None
    reports_hits: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """An answer, or the reason why there is none.

    status: HTTP status; 0: no answer at all.  error: empty if the answer is complete; else a short description.
    ttft_s: time from sending to the first token.  gaps_s: times between tokens.  total_s: time until the end.
    text, logprobs: the answer; logprobs only if requested and received.
    retry_after_s: the wait that a refusal asks for.
    answer_id, request_id: the endpoint's ids of the answer (from its body) and of the request (from a header).
    """

    status: int
    error: str = ""
    ttft_s: float = 0.0
    gaps_s: tuple[float, ...] = ()
    total_s: float = 0.0
    text: str = ""
    logprobs: tuple[float, ...] = ()
    usage: ReportedUsage = ReportedUsage()
    retry_after_s: float = 0.0
    answer_id: str = ""
    request_id: str = ""

    @property
    def ok(self) -> bool:
        return not self.error
