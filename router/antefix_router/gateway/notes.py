"""Records which parts of a request were not used as the client sent them. Such a field is named in the answer's
headers, counted, and logged once per field.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterable
from itertools import islice
from typing import Final
from urllib.parse import quote

log = logging.getLogger("antefix.gateway")

# Proxies commonly accept 8 KiB of headers in all.
HEADER_BYTES_MAX: Final = 1024
_NAME_BYTES_MAX: Final = 128
# The most names per request. A body of 32 MB has room for millions of keys, and naming each would delay every stream.
_NUM_IGNORED_MAX: Final = 1000
# Field names of known APIs look like this. Any other key may be text of a prompt, so it is counted without its name.
_SHOWN: Final = re.compile(r"[A-Za-z_][\w-]{0,39}(?:(?:\[\])*\.[A-Za-z_][\w-]{0,39})*(?:\[\])*", re.ASCII)
_INDEX: Final = re.compile(r"\[\d+\]")


class IgnoredFields:
    """Counts how often each field was ignored, over all requests. Names come from clients, so their number is limited,
    and a name that does not look like a field's is not recorded.
    """

    NUM_NAMES_MAX: Final = 1000
    OTHERS: Final = "(others)"

    def __init__(self) -> None:
        self.num_requests = 0
        self.counts: dict[str, int] = {}

    def count(self, names: Iterable[str], *, num_unnamed: int = 0) -> None:
        """Count one request's ignored fields. Each name is logged the first time that it occurs."""
        self.num_requests += 1
        if num_unnamed:
            self.counts[self.OTHERS] = self.counts.get(self.OTHERS, 0) + num_unnamed
        for name in names:
            is_full = name not in self.counts and len(self.counts) >= self.NUM_NAMES_MAX
            if is_full or not _SHOWN.fullmatch(name):
                name = self.OTHERS
            if name not in self.counts:
                log.info("requests have the field %s, which has no effect here; the field is ignored and counted", name)
            self.counts[name] = self.counts.get(name, 0) + 1


class Notes:
    """The notes of one request. Paths are JSON paths, such as "messages[0].content[1].colour"."""

    def __init__(self, ignored: IgnoredFields | None = None) -> None:
        self.mode = ""
        self.model = ""
        # Answers in the history whose reasoning was restored because the client had not sent it.
        self.num_restored = 0
        self._counter = ignored
        # By names without indices, so that a field in each of a thousand messages is reported once.
        self._ignored: dict[str, str] = {}
        self._num_unnamed = 0
        self._left_out: list[str] = []
        self._flattened: list[str] = []
        self._foreign: list[str] = []
        self._moved: list[str] = []

    def ignore(self, path: str) -> None:
        """Record that a field has no effect here."""
        self._ignored.setdefault(_printable(_INDEX.sub("[]", path)), path)

    def ignore_all(self, where: str, names: Collection[str]) -> None:
        """Record the fields of the object at `where` that were not used."""
        room = max(0, _NUM_IGNORED_MAX - len(self._ignored))
        for name in islice(names, room):
            self.ignore(f"{where}.{name}" if where else name)
        self._num_unnamed += max(0, len(names) - room)

    def leave_out(self, path: str, what: str) -> None:
        """Record a part of the request that the model is not shown, except perhaps as a placeholder."""
        self._left_out.append(f"{path} ({what})")

    def flatten(self, path: str, what: str) -> None:
        """Record a part of the request that the model is shown in another form."""
        self._flattened.append(f"{path} ({what})")

    def move(self, name: str, what: str) -> None:
        """Record a part of the request that the model is shown in a later place."""
        self._moved.append(f"{name} ({what})")

    def call_foreign(self, path: str) -> None:
        """Record that thinking came without a valid signature of this deployment. Such thinking is shown to the model
        as ordinary text.
        """
        self._foreign.append(path)

    def close(self) -> None:
        """The request has been read completely."""
        if self._ignored and self._counter is not None:
            self._counter.count(self._ignored, num_unnamed=self._num_unnamed)

    def headers(self) -> dict[str, str]:
        values = {
            "antefix-ignored": _listed([*self._ignored.values()], num_more=self._num_unnamed),
            "antefix-left-out": _listed(self._left_out),
            "antefix-flattened": _listed(self._flattened),
            "antefix-moved": _listed(self._moved),
            "antefix-foreign-thinking": _listed(self._foreign),
            "antefix-restored-thinking": str(self.num_restored or ""),
            "antefix-mode": self.mode,
            "antefix-model": _printable(self.model),
        }
        return {name: value for name, value in values.items() if value}


def _listed(paths: list[str], *, num_more: int = 0) -> str:
    """As many paths of ignored fields as fit into a header, and how many more there are."""
    text = ""
    for number, path in enumerate(paths):
        longer = f"{text}, {_printable(path)}" if text else _printable(path)
        if len(longer) > HEADER_BYTES_MAX:
            return f"{text}, +{len(paths) - number + num_more} more"
        text = longer
    return f"{text}, +{num_more} more" if num_more else text


def _printable(text: str) -> str:
    """Clients choose the names, so they are escaped: they must not end a header or contain terminal control
    characters.
    """
    shown = quote(text[:_NAME_BYTES_MAX], safe="[]().*_-:/@$+!~' ")
    named = shown.rstrip(" ")
    shown = named + "%20" * (len(shown) - len(named))  # a header's value does not end with a space
    is_whole = len(text) <= _NAME_BYTES_MAX and len(shown) <= _NAME_BYTES_MAX
    return shown if is_whole else shown[: _NAME_BYTES_MAX - 3] + "..."
