"""One request to an endpoint, and what came back."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """prompt: the text of one user message.  max_tokens: of the answer.

    user, salt: the request's `user` and `cache_salt` fields; empty: not sent.
    logprobs: ask for the log probability of each token of the answer (OpenAI dialects).
    idempotency_key: sent as the header of that name; empty: not sent.
    breakpoint: mark the prompt as a prefix to be cached (Anthropic's dialect needs it; the others ignore it).
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
    """Tokens as the endpoint reports them. prompt_tokens: all of them, hits included, in every dialect.

    reports_hits: the endpoint says how many were hits; if not, cached_tokens is 0.
    missed_tokens: where the endpoint reports misses of its own (DeepSeek's `prompt_cache_miss_tokens`); else None.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    written_tokens: int = 0
    output_tokens: int = 0
    missed_tokens: int | None = None
    reports_hits: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """An answer, or why there is none.

    status: of HTTP; 0: no answer at all.  error: empty where the answer is whole; else in few words.
    ttft_s: from sending until the first token.  gaps_s: between tokens that came apart.  total_s: until the end.
    text, logprobs: the answer; logprobs only where asked for and given.
    retry_after_s: what a refusal asks for.
    answer_id, request_id: the endpoint's own names for the answer (its body) and the request (a header).
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
