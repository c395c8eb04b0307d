"""What the descriptors of a process are, by kind, and which rule each kind is held to during a soak.

A segment file that exists may be open once per process: a cache keeps it, and the store's number of segments is its
bound, so it may go up and down. All other descriptors must be flat, by kind and in all. A deleted segment keeps its
space on the disk while it is open, so it must be closed soon. A second descriptor of the same segment is of the kind
"segments again", which must be flat as well, so that no leak hides below the bound of the cache.
"""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

SEGMENTS: Final = "segments"
SEGMENTS_AGAIN: Final = "segments again"
DELETED_SEGMENTS: Final = "deleted segments"
# A reader looks for deleted segments once per second; a busy machine and the distance of the samples need more.
DELETED_OPEN_S_MAX: Final = 30.0

_DELETED = " (deleted)"
# By the end of a link's target, the kind of the descriptor.
_KINDS = (
    (r"^socket:", "sockets"),
    (r"^pipe:", "pipes"),
    (r"^anon_inode:", "events"),
    (r"^/memfd:|^/dev/shm/", "shared memory"),
    (r"^/dev/", "devices"),
    (r"\.mdb$", "index"),
    (r"\.ledger$", "ledger"),
    (r"\.log$", "logs"),
)


def kind_of(target: str) -> str:
    """The kind of a descriptor. target: of its link in /proc/PID/fd."""
    name = target.removesuffix(_DELETED)
    if name.endswith(".seg"):
        return DELETED_SEGMENTS if name != target else SEGMENTS
    return next((kind for pattern, kind in _KINDS if re.search(pattern, name)), "other files")


def targets_of(pid: int) -> list[str]:
    """The targets of a process's descriptors.  Raises:  OSError: there is no such process."""
    found = []
    for path in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            found.append(str(path.readlink()))
    return found


def kinds_of(targets: Iterable[str]) -> Counter[str]:
    """The number of descriptors of each kind."""
    kinds: Counter[str] = Counter()
    for target, number in Counter(targets).items():
        kind = kind_of(target)
        if kind == SEGMENTS:
            kinds[SEGMENTS] += 1
            kinds[SEGMENTS_AGAIN] += number - 1
        else:
            kinds[kind] += number
    return kinds


def num_segments(store_dir: Path) -> int:
    """The number of the store's segment files."""
    return sum(1 for _ in store_dir.rglob("*.seg"))


@dataclass(slots=True)
class OpenFiles:
    """The descriptors of one process at the times of its samples.

    num_bound: the largest number of segments that the store had.  deleted_open_s: the longest time that a deleted
    segment was seen open.
    """

    num_bound: int = 0
    num_segments_max: int = 0
    deleted_open_s: float = 0.0
    kinds: list[Counter[str]] = field(default_factory=list)
    # When each deleted segment that is open now was first seen.
    _seen_s: dict[str, float] = field(default_factory=dict)

    def add(self, at_s: float, targets: Iterable[str], num_bound: int) -> Counter[str]:
        """Note a sample. num_bound: the store's number of segments. Returns the descriptors by kind."""
        targets = list(targets)
        kinds = kinds_of(targets)
        self.kinds.append(kinds)
        self.num_bound = max(self.num_bound, num_bound)
        self.num_segments_max = max(self.num_segments_max, kinds[SEGMENTS])
        deleted = {target for target in targets if kind_of(target) == DELETED_SEGMENTS}
        self._seen_s = {target: self._seen_s.get(target, at_s) for target in deleted}
        self.deleted_open_s = max([self.deleted_open_s, *(at_s - seen_s for seen_s in self._seen_s.values())])
        return kinds

    def series(self) -> dict[str, list[int]]:
        """The number of descriptors of each kind, by sample. "files": all that have no bound of their own."""
        bounded = (SEGMENTS, DELETED_SEGMENTS)
        names = sorted({name for kinds in self.kinds for name in kinds})
        found = {name: [kinds[name] for kinds in self.kinds] for name in names}
        found["files"] = [sum(number for name, number in kinds.items() if name not in bounded) for kinds in self.kinds]
        return found

    @property
    def are_bounded(self) -> bool:
        return self.num_segments_max <= self.num_bound and self.deleted_open_s <= DELETED_OPEN_S_MAX
