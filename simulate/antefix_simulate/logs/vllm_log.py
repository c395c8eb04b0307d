r"""Reads requests from vLLM's own log.

vLLM needs `--enable-log-requests`, and `--enable-log-outputs` for lengths of answers.

    INFO 10-09 12:00:01 [logger.py:39] Received request ID: prompt: '...', params: ..., prompt_token_ids: [1, 2], ...
    DEBUG 10-09 12:00:01 [logger.py:55] Request ID details: prompt: '...', prompt_token_ids: [1, 2], ...

If the log has token ids, these are hashed, which is exact. Newer versions log neither without
`VLLM_LOGGING_LEVEL=DEBUG`. JSON rows, as `vllm run-batch` reads and writes them, are read as OpenAI's.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import numpy as np

from antefix_simulate.logs.chat_log import read_chats
from antefix_simulate.logs.log_rows import text_lines
from antefix_simulate.logs.logged_call import Ignored, LoggedCall, Tokens

_REQUEST: Final = re.compile(r"(?:Received request (?P<a>\S+):|Request (?P<b>\S+) details:) (?=prompt: )")
_WITHOUT_PROMPT: Final = re.compile(r"Received request \S+: params: ")
_ANSWER: Final = re.compile(r"Generated response (?P<id>\S+?)(?: \([^)]*\))?: output: ")
_TEXT: Final = re.compile(r"prompt: ('(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"|None)")
_IDS: Final = re.compile(r"(?:prompt|output)_token_ids: (?:array\('[A-Z]', )?\[([0-9, ]*)\]")
_MOMENT: Final = re.compile(r"\b(?:(\d{4})-)?(\d{2})-(\d{2})[ T](\d{2}):(\d{2}):(\d{2})(?:[.,](\d+))?")
# The log's dates have no year. This leap year is used for all; entries on both sides of New Year's Eve stay in order.
_YEAR: Final = 2000


def read_vllm(path: Path, ignored: Ignored) -> Iterator[LoggedCall]:
    """Raises:  InvalidRequest: the file cannot be read to its end."""
    first = next((line for line in text_lines(path) if line.strip()), "")
    if first.lstrip()[:1] in ("{", "["):
        yield from read_chats(path, ignored)
        return
    # The lengths of answers are logged after their requests, so they are collected first.
    output_tokens = dict(_answers(path))
    for line in text_lines(path):
        found = _REQUEST.search(line)
        if found is None:
            if _WITHOUT_PROMPT.search(line):
                ignored.count("requests of which vLLM logged no prompt: their details come at VLLM_LOGGING_LEVEL=DEBUG")
            continue
        request_id = found["a"] or found["b"]
        tokens, text = _ids_of(line), _text_of(line)
        if tokens is None and not text:
            ignored.count("requests whose prompt is not in the log")
            continue
        yield LoggedCall(
            at_s=_moment(line[: found.start()]),
            text=b"" if tokens is not None else text,
            tokens=tokens,
            num_tokens=None if tokens is None else len(tokens),
            output_tokens=output_tokens.get(request_id),
        )


def _answers(path: Path) -> Iterator[tuple[str, int]]:
    for line in text_lines(path):
        found = _ANSWER.search(line)
        if found is not None:
            tokens = _ids_of(line)
            yield found["id"], 0 if tokens is None else len(tokens)


def _ids_of(line: str) -> Tokens | None:
    found = _IDS.search(line)
    if found is None:
        return None
    written = [each.strip() for each in found[1].split(",")]
    # If numbers are not separated by commas, the line was cut or changed, and is not used as a list of ids.
    if not all(each.isdigit() for each in written):
        return None
    numbers = [int(each[:12]) for each in written]
    return np.asarray(numbers, dtype=np.uint32) if max(numbers) < 1 << 32 else None


def _text_of(line: str) -> bytes:
    found = _TEXT.search(line)
    if found is None or found[1] == "None":
        return b""
    try:
        value = ast.literal_eval(found[1])
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return b""
    return str(value).encode(errors="replace")


def _moment(text: str) -> float | None:
    found = _MOMENT.search(text)
    if found is None:
        return None
    year, month, day, hour, minute, second = (int(each or _YEAR) for each in found.groups()[:6])
    try:
        whole = datetime(year, month, day, hour, minute, second, tzinfo=UTC).timestamp()
    except ValueError:
        return None
    return whole + float(f"0.{found[7] or 0}")
