"""Turns a log into a trace: reads a format, converts text to tokens, and names the requests' prefixes.

The log is read twice: first to learn how many bytes a token takes, then to name prefixes. The text of a row is kept in
memory only while the row is processed.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np

from antefix.errors import InvalidRequest
from antefix_simulate.logs.chat_log import read_chats
from antefix_simulate.logs.claude_code_log import read_claude_code
from antefix_simulate.logs.langfuse_log import read_langfuse
from antefix_simulate.logs.litellm_log import read_litellm
from antefix_simulate.logs.logged_call import Ignored, LoggedCall, LogReader, Tokens
from antefix_simulate.logs.vllm_log import read_vllm
from antefix_simulate.prefix_names import names_of
from antefix_simulate.trace import TraceRequest

LOG_FORMATS: Final[dict[str, LogReader]] = {
    "openai-jsonl": read_chats,
    "anthropic": read_chats,
    "vllm": read_vllm,
    "litellm": read_litellm,
    "langfuse": read_langfuse,
    "claude-code": read_claude_code,
}
# Used without token counts in the log and without a tokenizer: English and code take 3.5 to 4.5 bytes per token.
BYTES_PER_TOKEN: Final = 4.0
# Bytes per token outside this range are ignored: such counts include images or hidden prompts.
_RATES: Final = (1.0, 12.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportSetup:
    """key: the key that prefixes are hashed with. gap_s: seconds between requests, for a log without times. tokenize:
    turns text into tokens.
    """

    key: bytes
    unit_tokens: int
    per_user: bool = False
    gap_s: float = 1.0
    bytes_per_token: float | None = None
    tokenize: Callable[[bytes], Tokens] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportedLog:
    """counted: where the token counts come from: "logged", "tokenizer" or "estimated", with words for the reader."""

    requests: tuple[TraceRequest, ...]
    counted: str
    bytes_per_token: float
    has_times: bool
    ignored: Ignored


def import_log(
    paths: Sequence[Path], log_format: str, setup: ImportSetup, *, progress: Callable[[int], None]
) -> ImportedLog:
    """Read logs in one format. progress: called with the number of requests named so far.

    Raises:  InvalidRequest: an unknown format, an unreadable file, or no request in any file; the message says why.
    """
    if log_format not in LOG_FORMATS:
        raise InvalidRequest(f"unknown log format {log_format!r}: use one of {', '.join(sorted(LOG_FORMATS))}")
    # 1. How many bytes a token takes, and whether the log has counts and times.
    survey = _Survey.of(_calls(paths, log_format, Ignored()))
    ignored = Ignored()
    if not survey.num_calls:
        list(_calls(paths, log_format, ignored))
        why = "; ".join(ignored.lines()) or "it is empty"
        raise InvalidRequest(f"no request was found in {', '.join(path.name for path in paths)} as {log_format}: {why}")
    rate = setup.bytes_per_token or survey.bytes_per_token or BYTES_PER_TOKEN
    # 2. Names of every prompt's prefixes.
    requests = []
    for number, call in enumerate(_calls(paths, log_format, ignored)):
        at_s = number * setup.gap_s if not survey.has_times else call.at_s
        if at_s is None:
            ignored.count("requests without a time, in a log that has times")
            continue
        requests.append(_request(call, at_s, rate, setup))
        if number % 256 == 0:
            progress(number)
    requests.sort(key=lambda request: request.at_s)
    return ImportedLog(
        requests=tuple(requests),
        counted="tokenizer"
        if setup.tokenize
        else ("logged" if survey.num_counted == survey.num_calls else "estimated"),
        bytes_per_token=rate,
        has_times=survey.has_times,
        ignored=ignored,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Survey:
    num_calls: int
    num_counted: int
    has_times: bool
    bytes_per_token: float | None

    @classmethod
    def of(cls, calls: Iterator[LoggedCall]) -> _Survey:
        num_calls = num_counted = num_timed = 0
        rates = []
        for call in calls:
            num_calls += 1
            num_timed += call.at_s is not None
            num_counted += call.num_tokens is not None or call.tokens is not None
            own = (call.num_tokens or 0) - call.head_tokens
            if call.text and own > 0 and _RATES[0] <= len(call.text) / own <= _RATES[1]:
                rates.append(len(call.text) / own)
        rate = statistics.median(rates) if rates else None
        return cls(num_calls=num_calls, num_counted=num_counted, has_times=num_timed > 0, bytes_per_token=rate)


def _calls(paths: Sequence[Path], log_format: str, ignored: Ignored) -> Iterator[LoggedCall]:
    for path in paths:
        yield from LOG_FORMATS[log_format](path, ignored)


def _request(call: LoggedCall, at_s: float, rate: float, setup: ImportSetup) -> TraceRequest:
    if setup.tokenize is not None and call.tokens is None:
        tokens = setup.tokenize(call.text)
        call = replace(call, tokens=tokens, num_tokens=len(tokens), text=b"", head_tokens=0)
    names = names_of(call, key=setup.key, unit_tokens=setup.unit_tokens, bytes_per_token=rate, per_user=setup.per_user)
    num_tokens = call.num_tokens
    if call.tokens is not None:
        num_tokens = len(call.tokens)
    elif num_tokens is None:
        num_tokens = call.head_tokens + round(len(call.text) / rate)
    num_tokens = max(num_tokens, 1)
    # Where the text seems to have more tokens than the log counts, the log's count is used: it is what was billed.
    names = names[: num_tokens // setup.unit_tokens]
    output = call.output_tokens if call.output_tokens is not None else round(call.output_bytes / rate)
    return TraceRequest(
        at_s=at_s,
        num_tokens=num_tokens,
        output_tokens=output,
        names=np.asarray(names, dtype=np.int64),
        session=call.session,
        cached_tokens=None if call.cached_tokens is None else min(call.cached_tokens, num_tokens),
    )
