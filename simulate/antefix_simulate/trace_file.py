"""Writes Antefix's own trace files; `trace.py` reads them, docs/TRACES.md has the format. One JSON object per line.

    {"antefix_trace": 1, "unit_tokens": 64, "source": "openai-jsonl", ...}
    {"at_s": 0.0, "tokens": 5210, "output": 312, "like": 0, "shared": 80, "names": [81985529216486, ...]}

The first `shared` names of a request are those of request number `like`, counted from 0. Conversations repeat their
beginning, and a file that repeated these names each time would be a hundred times larger.
"""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

from antefix.errors import InvalidRequest
from antefix_simulate.trace import TRACE_VERSION, TraceRequest

# The .gz header's time, fixed so that equal traces give equal files.
_NO_TIME: Final = 0


def write_trace(path: Path, requests: Iterable[TraceRequest], *, unit_tokens: int, about: dict[str, Any]) -> int:
    """Write requests in order of arrival, with times counted from the first request. Returns how many. The file is
    plain text, or compressed if its name ends in .gz.

    about: further fields of the first line, which say where the trace comes from.
    Raises:  InvalidRequest: the file cannot be written.
    """
    draft = path.with_name(path.name + ".part")
    try:
        with draft.open("wb") as raw:
            packed = gzip.GzipFile(filename="", fileobj=raw, mode="wb", mtime=_NO_TIME) if path.suffix == ".gz" else raw
            with io.TextIOWrapper(packed, encoding="utf-8", newline="\n") as file:
                file.write(_line({"antefix_trace": TRACE_VERSION, "unit_tokens": unit_tokens, **about}))
                number = 0
                for row in _rows(requests):
                    file.write(_line(row))
                    number += 1
        draft.replace(path)
    except OSError as err:
        raise InvalidRequest(f"cannot write {path}: {err.strerror or err}") from err
    finally:
        draft.unlink(missing_ok=True)
    return number


def _rows(requests: Iterable[TraceRequest]) -> Iterable[dict[str, Any]]:
    latest: dict[int, int] = {}
    sessions: dict[str, int] = {}
    started_s: float | None = None
    for number, request in enumerate(requests):
        started_s = request.at_s if started_s is None else started_s
        names = request.names.tolist()
        shared = _num_known(names, latest)
        row: dict[str, Any] = {
            "at_s": round(request.at_s - started_s, 3),
            "tokens": request.num_tokens,
            "output": request.output_tokens,
        }
        if shared:
            row |= {"like": latest[names[shared - 1]], "shared": shared}
        row["names"] = names[shared:]
        if request.session:
            # Sessions are numbered, so that the file does not tell whose they are.
            row["session"] = sessions.setdefault(request.session, len(sessions) + 1)
        if request.cached_tokens is not None:
            row["cached"] = request.cached_tokens
        latest.update(dict.fromkeys(names, number))
        yield row


def _num_known(names: list[int], latest: dict[int, int]) -> int:
    """How many leading names some earlier request had. Names are chained, so the last shared name implies all earlier
    ones.
    """
    low, high = 0, len(names)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if names[middle - 1] in latest else (low, middle - 1)
    return low


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, separators=(",", ":"), ensure_ascii=True, allow_nan=False) + "\n"
