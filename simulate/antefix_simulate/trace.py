"""Traces: requests with lengths, times and the names of their prefixes; never any text.

A request's `names[i]` stands for its first (i + 1) * unit_tokens tokens: equal names mean equal prefixes. A trace's
resolution limits what can be simulated: its unit is the smallest multiple of a block that its hashes can tell apart.
"""

from __future__ import annotations

import gzip
import math
import random
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from antefix.checked_files import parse_json
from antefix.errors import InvalidRequest

Names = npt.NDArray[np.int64]

# Tokens per hash, as the format defines it.
MOONCAKE_HASH_TOKENS = 512
# Hash ids of a Claude Code conversation are numbered within it; so many fit before two conversations would collide.
_LOCAL_IDS_MAX = 1 << 32
# Size limit of a line: no model's request is longer, and reading it would only fill memory.
LINE_BYTES_MAX = 256 * 2**20
# The version of Antefix's own trace files (`trace_file.py`).
TRACE_VERSION = 1
_NAMES_MAX = 1 << 52
_TOKENS_MAX = 1 << 40
_WRONG = (KeyError, TypeError, ValueError, AttributeError, OverflowError)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TraceRequest:
    """at_s: arrival time from the start of the trace.  names: complete units of the prompt, in order; tokens after them
    are unique to the request.  cached_tokens: tokens that its provider read from a cache; None: not known.
    """

    at_s: float
    num_tokens: int
    output_tokens: int
    names: Names
    session: str = ""
    cached_tokens: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """Requests in order of arrival."""

    name: str
    unit_tokens: int
    requests: tuple[TraceRequest, ...]

    @property
    def num_tokens(self) -> int:
        return sum(request.num_tokens for request in self.requests)


def load(path: Path, trace_format: str, *, block_size: int, spread_s: float = 3600.0) -> Trace:
    """Read a trace file (plain or .gz) in the named format.

    spread_s: conversations whose clocks all start at zero are started at random times within this span, seeded.
    Raises:  InvalidRequest: an unknown format, a file that has no requests or cannot be read to its end, or a line that
             is not a request of the format; the message names it.
    """
    if trace_format not in FORMATS:
        raise InvalidRequest(f"unknown trace format {trace_format!r}: use one of {', '.join(sorted(FORMATS))}")
    return FORMATS[trace_format](path, block_size, spread_s)


def _load_mooncake(path: Path, block_size: int, spread_s: float) -> Trace:
    unit = math.lcm(block_size, MOONCAKE_HASH_TOKENS)
    requests = []
    for where, row in _rows(path):
        try:
            requests.append(
                TraceRequest(
                    at_s=_seconds(row["timestamp"]) / 1000,
                    num_tokens=int(row["input_length"]),
                    output_tokens=int(row["output_length"]),
                    names=_units(row["hash_ids"], 0, int(row["input_length"]), MOONCAKE_HASH_TOKENS, unit),
                )
            )
        except _WRONG as err:
            raise _not_a("mooncake request", where, err) from err
    return _trace(path, unit, requests)


def _load_claude_code(path: Path, block_size: int, spread_s: float) -> Trace:
    rng = random.Random(0)
    requests: list[TraceRequest] = []
    unit = 0
    for index, (where, row) in enumerate(_rows(path)):
        try:
            if row["hash_id_scope"] != "local":
                raise ValueError(f"hash_id_scope is {row['hash_id_scope']!r}, not local")
            hash_tokens = int(row["block_size"])
            if hash_tokens < 1 or unit not in (0, math.lcm(block_size, hash_tokens)):
                raise ValueError(f"block_size is {hash_tokens}, but must be positive and the same in all lines")
            unit = math.lcm(block_size, hash_tokens)
            start_s = rng.uniform(0, spread_s)
            for at_s, call in _calls(row["requests"], start_s):
                requests.append(
                    TraceRequest(
                        at_s=at_s,
                        num_tokens=int(call["in"]),
                        output_tokens=int(call["out"]),
                        names=_units(call["hash_ids"], index * _LOCAL_IDS_MAX, int(call["in"]), hash_tokens, unit),
                        session=str(row["id"]),
                    )
                )
        except _WRONG as err:
            raise _not_a("claude-code conversation", where, err) from err
    return _trace(path, unit or block_size, requests)


def _load_antefix(path: Path, block_size: int, spread_s: float) -> Trace:
    rows = _rows(path)
    where, head = next(rows, (path.name, {}))
    try:
        if head["antefix_trace"] != TRACE_VERSION:
            raise ValueError(
                f"the trace's version is {head['antefix_trace']!r}, not {TRACE_VERSION}; a newer Antefix wrote the "
                "trace"
            )
        unit_tokens = int(head["unit_tokens"])
        if not 1 <= unit_tokens < 1 << 32:
            raise ValueError(f"unit_tokens is {unit_tokens}")
    except _WRONG as err:
        raise _not_a("trace of Antefix", where, err) from err
    unit = math.lcm(block_size, unit_tokens)
    chains: list[Names] = []
    requests = []
    for where, row in rows:
        try:
            names = _names(row, chains)
            num_tokens = _tokens(row["tokens"])
            if num_tokens < max(1, len(names) * unit_tokens):
                raise ValueError(f"{len(names)} names for {num_tokens} tokens")
            requests.append(
                TraceRequest(
                    at_s=_seconds(row["at_s"]),
                    num_tokens=num_tokens,
                    output_tokens=_tokens(row["output"]),
                    names=names[unit // unit_tokens - 1 :: unit // unit_tokens],
                    session=str(row.get("session", "")),
                    cached_tokens=None if row.get("cached") is None else _tokens(row["cached"]),
                )
            )
            chains.append(names)
        except _WRONG as err:
            raise _not_a("request of such a trace", where, err) from err
    return _trace(path, unit, requests)


def _names(row: dict[str, Any], chains: list[Names]) -> Names:
    """A request's names: some from the beginning of an earlier request, then its own."""
    own = np.asarray(row["names"], dtype=np.int64)
    shared, like = int(row.get("shared", 0)), int(row.get("like", 0))
    if own.ndim != 1 or (len(own) and not 0 <= int(own.min()) <= int(own.max()) < _NAMES_MAX):
        raise ValueError(f"names of blocks must be numbers in [0, 2^{_NAMES_MAX.bit_length() - 1})")
    if not shared:
        return own
    if not (0 <= like < len(chains) and 0 < shared <= len(chains[like])):
        raise ValueError(f"request {like} does not have {shared} names that a later request could share")
    return np.concatenate((chains[like][:shared], own))


def _tokens(value: Any) -> int:
    if not 0 <= int(value) < _TOKENS_MAX:
        raise ValueError(f"{value} is not a valid number of tokens")
    return int(value)


def format_of(path: Path) -> str:
    """The format of a trace file, recognized by its first line.

    Raises:  InvalidRequest: the file cannot be read, or has none of the known formats.
    """
    _, row = next(_rows(path), ("", {}))
    marks = {"antefix_trace": "antefix", "hash_id_scope": "claude-code", "hash_ids": "mooncake"}
    found = next((name for mark, name in marks.items() if mark in row), None)
    if found is None:
        raise InvalidRequest(
            f"{path.name} is not a trace: say --format {' or '.join(sorted(FORMATS))}, or make one of a log "
            "of requests with `antefix trace import`"
        )
    return found


def _trace(path: Path, unit_tokens: int, requests: list[TraceRequest]) -> Trace:
    if not requests:
        raise InvalidRequest(f"{path.name} has no requests")
    requests.sort(key=lambda request: request.at_s)
    return Trace(name=path.name, unit_tokens=unit_tokens, requests=tuple(requests))


def _not_a(what: str, where: str, err: Exception) -> InvalidRequest:
    why = f"it has no {err}" if isinstance(err, KeyError) else str(err)
    return InvalidRequest(f"{where} is not a {what}: {why}; --format must name what the trace is written in")


def _seconds(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{value} is not a time")
    return number


FORMATS: dict[str, Callable[[Path, int, float], Trace]] = {
    "antefix": _load_antefix,
    "mooncake": _load_mooncake,
    "claude-code": _load_claude_code,
}


def _calls(rows: list[dict[str, Any]], start_s: float) -> Iterator[tuple[float, dict[str, Any]]]:
    """A conversation's model calls with their times; a sub-agent's calls count from its own start."""
    for row in rows:
        at_s = start_s + _seconds(row["t"])
        if row["type"] == "subagent":
            yield from _calls(row["requests"], at_s)
        else:
            yield at_s, row


def _units(hash_ids: list[int], base: int, num_tokens: int, hash_tokens: int, unit_tokens: int) -> Names:
    """Names of the complete units. Hashes are chained, so the last hash of a unit identifies all blocks before it."""
    step = unit_tokens // hash_tokens
    num_units = num_tokens // unit_tokens
    if num_tokens < 1 or len(hash_ids) < num_units * step:
        raise ValueError(f"{len(hash_ids)} hashes for {num_tokens} tokens")
    names = np.asarray(hash_ids[step - 1 : num_units * step : step], dtype=np.int64)
    if len(names) and (int(names.min()) < 0 or int(names.max()) >= _LOCAL_IDS_MAX):
        raise ValueError("hash ids must be in [0, 2^32)")
    return names + base


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as lines:
        for number, line in enumerate(_bounded(lines, path.name), start=1):
            where = f"{path.name}, line {number}"
            if not line.strip():
                continue
            row = parse_json(line, where)
            if not isinstance(row, dict):
                raise InvalidRequest(f"{where} is not a JSON object")
            yield where, row


def _bounded(lines: Any, name: str) -> Iterator[str]:
    try:
        while line := lines.readline(LINE_BYTES_MAX):
            if len(line) >= LINE_BYTES_MAX:
                raise InvalidRequest(f"a line of {name} is longer than {LINE_BYTES_MAX} bytes")
            yield line
    except UnicodeDecodeError as err:
        raise InvalidRequest(f"{name} is not text: {err}") from err
    except (OSError, EOFError, zlib.error) as err:
        raise InvalidRequest(f"{name} cannot be read to its end: {err}") from err
