"""Log lines: one line per event, as readable text or as JSON, with the ids of the request and of its trace. Repeated
ones are held back.

No log line, from here or elsewhere, may hold text of prompts or answers.
"""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
import traceback
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import IO, Any, Final

from prometheus_client.core import Metric

from antefix.errors import AntefixError, InvalidRequest
from antefix.telemetry.context import request_id, trace_id
from antefix.telemetry.shown import counter

log = logging.getLogger("antefix.telemetry")

LEVELS: Final = ("debug", "info", "warning", "error")
FORMATS: Final = ("text", "json")
# The access log has one line a request, which repeat by their nature.
ACCESS: Final = "antefix.access"
# Lines that say the same: so many within so long, then none until that is over.
NUM_ALIKE_MAX: Final = 10
ALIKE_S: Final = 60.0
_NUM_KEYS_MAX: Final = 1024
# The loggers of our packages; all others stay at info.
_OURS: Final = (
    "antefix",
    *(f"antefix_{room}" for room in ("billing", "console", "decode", "engines", "kvstore", "prefill", "router")),
)
# What `logging` gives a record by itself; anything else came as `extra`.
_OWN: Final = frozenset(vars(logging.makeLogRecord({}))) | {
    "message",
    "asctime",
    "num_left_out",
    "request_id",
    "trace_id",
}


class Lines:
    """Counts log lines by level, both those written and those held back. One a process."""

    def __init__(self) -> None:
        self.written: dict[str, int] = dict.fromkeys(LEVELS, 0)
        self.held_back: dict[str, int] = dict.fromkeys(LEVELS, 0)

    def metrics(self) -> Iterable[Metric]:
        written = {(level,): float(number) for level, number in self.written.items()}
        held = {(level,): float(number) for level, number in self.held_back.items()}
        yield counter("antefix_log_lines", "Log lines that were written.", written, ("level",))
        yield counter(
            "antefix_log_lines_held_back",
            "Log lines that were left out because they repeated others.",
            held,
            ("level",),
        )


lines: Final = Lines()


class RepeatFilter(logging.Filter):
    """Lets at most NUM_ALIKE_MAX lines of one kind through in ALIKE_S seconds; the next line that is let through says
    how many were held back.

    Lines with the same message template are of one kind, whatever values fill the template. Errors are of one kind only
    if they are equal, because each error of ours has an id that its client was told and that must be found in the log.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._mutex = threading.Lock()
        # By kind: when its time began, lines let through since, and held back.
        self._kinds: OrderedDict[tuple[str, int, str], list[float]] = OrderedDict()

    def filter(self, record: logging.LogRecord) -> bool:
        level = _level_of(record)
        held = record.name != ACCESS and not self._passes(record)
        counts = lines.held_back if held else lines.written
        counts[level] += 1
        return not held

    def _passes(self, record: logging.LogRecord) -> bool:
        text = record.getMessage() if record.levelno >= logging.ERROR else str(record.msg)
        key, now_s = (record.name, record.levelno, text), self._clock()
        with self._mutex:
            kind = self._kinds.get(key)
            if kind is None or now_s - kind[0] >= ALIKE_S:
                if kind is not None and kind[2]:
                    record.num_left_out = int(kind[2])
                self._kinds[key] = kind = [now_s, 0, 0]
                self._kinds.move_to_end(key)
                while len(self._kinds) > _NUM_KEYS_MAX:
                    self._kinds.popitem(last=False)
            passes = kind[1] < NUM_ALIKE_MAX
            kind[1 if passes else 2] += 1
            return passes


class _Formatter(logging.Formatter):
    """Both forms of log lines use this: a stack trace shows places and the kind of error, but a message only if the
    error is one of ours.

    The message of a KeyError, a UnicodeDecodeError or a library's error may hold the value that the error is about,
    such as text of a request, or a key.
    """

    def formatException(self, exc_info: Any) -> str:
        return trace_of(exc_info[1]) if exc_info and exc_info[1] is not None else ""

    def format(self, record: logging.LogRecord) -> str:
        # Another handler's formatter may have left its own trace there.
        shown = logging.makeLogRecord({**vars(record), "exc_text": None})
        if record.name == "asyncio" and record.exc_info:
            # Its further lines show the task with its exception, which the trace below does without the value.
            shown.msg, shown.args = record.getMessage().partition("\n")[0], ()
        return super().format(shown)


class TextFormatter(_Formatter):
    """For people."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        text = super().formatMessage(record)
        notes = [f"{name}={value}" for name, value in _notes(record).items()]
        return f"{text} [{' '.join(notes)}]" if notes else text


class JsonFormatter(_Formatter):
    """For programs: one JSON object per log line."""

    def format(self, record: logging.LogRecord) -> str:
        message = record.getMessage()
        if record.name == "asyncio" and record.exc_info:
            message = message.partition("\n")[0]
        values: dict[str, Any] = {
            "time": f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(record.created))}.{int(record.msecs):03d}Z",
            "level": _level_of(record),
            "logger": record.name,
            "message": message,
            **_notes(record),
        }
        if record.exc_info:
            values["exception"] = self.formatException(record.exc_info)
        return json.dumps(values, ensure_ascii=False, default=str)


def trace_of(err: BaseException) -> str:
    """Where an error was raised, and by which other errors it was caused, without the values that messages of foreign
    errors hold.
    """
    parts: list[str] = []
    each: BaseException | None = err
    seen: set[int] = set()
    while each is not None and id(each) not in seen:
        seen.add(id(each))
        kind = f"{type(each).__module__}.{type(each).__qualname__}"
        told = f"{kind}: {each}" if _may_be_told(each) else f"{kind}: (its message is left out)"
        frames = "".join(traceback.format_tb(each.__traceback__))
        parts.append(f"Traceback (most recent call last):\n{frames}{told}")
        if isinstance(each, BaseExceptionGroup):
            parts += [trace_of(inner) for inner in each.exceptions]
        each = each.__cause__ or (None if each.__suppress_context__ else each.__context__)
    return "\n\nwhich was caused by:\n\n".join(parts)


def _may_be_told(err: BaseException) -> bool:
    # What is wrong with a request says what stood in it.
    return isinstance(err, (AntefixError, OSError)) and not isinstance(err, (InvalidRequest, UnicodeError))


def tell_of_crashes() -> None:
    """From now on, an error that ends this process or one of its threads is written to the log in the usual form."""

    def crashed(kind: type[BaseException], err: BaseException | None, _: Any) -> None:
        if err is not None and not issubclass(kind, KeyboardInterrupt):
            log.critical("the process or a thread of it was ended by a bug in the program", exc_info=err)

    sys.excepthook = crashed
    threading.excepthook = lambda args: crashed(args.exc_type, args.exc_value, args.exc_traceback)


class _Handler(logging.StreamHandler[IO[str]]):
    """Antefix's own log handler; a separate class tells it apart from other handlers."""


def set_up_logs(level: str = "info", form: str = "text", stream: IO[str] | None = None) -> None:
    """Write log lines to `stream` from now on, or to stderr if none is given. level, form: one of LEVELS and one of
    FORMATS.
    """
    handler = _Handler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    handler.addFilter(RepeatFilter())
    root = logging.getLogger()
    # Handlers that the program around us has set stay.
    root.handlers[:] = [*(each for each in root.handlers if not isinstance(each, _Handler)), handler]
    # Below that other people's packages tell what passes through them: the server of event streams each piece of text.
    root.setLevel(max(logging.INFO, logging.getLevelNamesMapping()[level.upper()]))
    for name in _OURS:
        logging.getLogger(name).setLevel(level.upper())


def _notes(record: logging.LogRecord) -> dict[str, Any]:
    """The fields next to a log line's message: ids, the caller's `extra`, and the number of lines held back."""
    notes = {name: value for name, value in vars(record).items() if name not in _OWN}
    ids = {"request_id": request_id(), "trace_id": trace_id()}
    notes.update({name: value for name, value in ids.items() if value})
    if left_out := getattr(record, "num_left_out", 0):
        notes["left_out"] = left_out
    return notes


def _level_of(record: logging.LogRecord) -> str:
    if record.levelno >= logging.ERROR:
        return "error"
    if record.levelno >= logging.WARNING:
        return "warning"
    return "info" if record.levelno >= logging.INFO else "debug"
