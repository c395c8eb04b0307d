"""Samples what processes and directories use during a soak, and fits a line to see if it grows.

The line is fitted to the samples after a warm-up, in which pools of threads, caches and a store's budget fill up. A
series is flat if the line rises by no more than is allowed (a fiftieth of memory and disk, one descriptor, one thread).
Memory and disk may also rise by no more than the scatter of the samples explains (three standard errors). Descriptors
have a rule per kind (benchmarks/soak_files.py).
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.soak_files import DELETED_OPEN_S_MAX, DELETED_SEGMENTS, SEGMENTS, OpenFiles, num_segments, targets_of

# The allowed growth is the larger of two: a share of the median, and a fixed number.
_ALLOWED_SHARE = {"memory_mb": 0.02, "disk_mb": 0.02}
# One more thread makes the line rise by 1.5 if it appears in the middle of the fitted part, and by less otherwise.
_ALLOWED = {"memory_mb": 1.0, "disk_mb": 0.1}
_ALLOWED_COUNT = 1.5
_ERRORS_MAX = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Growth:
    """Growth of one kind of sample, in its unit.

    half: the first sample after the warm-up.  rise: the line's rise after the warm-up.  allowed: the largest rise that
    counts as flat.
    """

    first: float
    half: float
    last: float
    per_h: float
    rise: float
    allowed: float

    @property
    def is_flat(self) -> bool:
        return self.rise <= self.allowed


def allowed_rise(kind: str, middle: float, error: float = 0.0) -> float:
    """The rise that is allowed after the warm-up, for samples whose median there is `middle`.

    error: the rise's standard error. It excuses no count, because a count that leaks may have much scatter.
    """
    if kind not in _ALLOWED:
        return _ALLOWED_COUNT
    return max(_ALLOWED[kind], _ALLOWED_SHARE[kind] * middle, _ERRORS_MAX * error)


def growth(kind: str, times_s: Sequence[float], values: Sequence[float], warm_up_s: float | None = None) -> Growth:
    """Fit a line to the samples after the warm-up.

    kind: "memory_mb", "disk_mb", or what was counted.  times_s, values: [N], N > 0; times rise.
    warm_up_s: seconds after the first sample; None: half of the time sampled.
    """
    times, found = np.array(times_s, float), np.array(values, float)
    sampled_s = times[-1] - times[0]
    half = times >= times[0] + min(sampled_s / 2 if warm_up_s is None else warm_up_s, sampled_s)
    x, y = times[half] - times[half].mean(), found[half]
    spread = float((x**2).sum())
    slope = float((x * y).sum() / spread) if spread else 0.0
    span = float(x[-1] - x[0])
    left = y - y.mean() - slope * x
    error = float(np.sqrt((left**2).sum() / (len(x) - 2) / spread)) if len(x) > 2 and spread else 0.0
    return Growth(
        first=float(found[0]),
        half=float(y[0]),
        last=float(found[-1]),
        per_h=3600 * slope,
        rise=slope * span,
        allowed=allowed_rise(kind, float(np.median(y)), error * span),
    )


@dataclass(slots=True)
class Samples:
    """Samples of one process or directory, by kind. warm_up_s: as `growth` takes it."""

    warm_up_s: float | None = None
    times_s: list[float] = field(default_factory=list)
    values: dict[str, list[float]] = field(default_factory=dict)
    # The number of threads per name, in the first sample and in the last. gRPC and Python's pools name their threads.
    threads_first: Counter[str] = field(default_factory=Counter)
    threads_last: Counter[str] = field(default_factory=Counter)
    files: OpenFiles = field(default_factory=OpenFiles)

    def add(self, at_s: float, **values: float) -> None:
        self.times_s.append(at_s)
        for kind, value in values.items():
            self.values.setdefault(kind, []).append(value)

    def add_process(self, at_s: float, pid: int, store_dir: Path) -> None:
        """Take a sample of a process; if the process has ended, nothing is recorded.  store_dir: of its segments."""
        with contextlib.suppress(OSError):
            before = num_segments(store_dir)
            targets = targets_of(pid)
            # A segment may be new or be deleted meanwhile.
            bound = max(before, num_segments(store_dir))
            self.add(at_s, memory_mb=resident_mb(pid), threads=num_threads(pid))
            self.files.add(at_s, targets, bound)
            self.threads_last = thread_names(pid)
            self.threads_first = self.threads_first or self.threads_last

    @property
    def is_flat(self) -> bool:
        return all(found.is_flat for found in self._grown().values()) and self.files.are_bounded

    def _series(self) -> dict[str, list[float]]:
        counted = self.files.series() if self.files.kinds else {}
        return {**self.values, **{name: [float(each) for each in found] for name, found in counted.items()}}

    def _grown(self) -> dict[str, Growth]:
        """The growth of each series that has no bound of its own."""
        return {
            kind: growth(kind, self.times_s, values, self.warm_up_s)
            for kind, values in self._series().items()
            if kind not in (SEGMENTS, DELETED_SEGMENTS)
        }

    def figures(self) -> dict[str, Any]:
        told: dict[str, Any] = {}
        series = self._series()
        for kind, found in self._grown().items():
            told[kind] = {
                **{name: round(getattr(found, name), 2) for name in ("first", "half", "last", "per_h", "rise")},
                "allowed": round(found.allowed, 2),
                "flat": found.is_flat,
                "samples": [round(value, 1) for value in _every_minute(self.times_s, series[kind])],
                "minutes": [round(at_s / 60, 1) for at_s in _every_minute(self.times_s, self.times_s)],
            }
        if self.files.kinds:
            told["bounded_files"] = {
                "segments_max": self.files.num_segments_max,
                "segments_of_store_max": self.files.num_bound,
                "deleted_segment_open_s": round(self.files.deleted_open_s, 1),
                "deleted_segment_open_s_max": DELETED_OPEN_S_MAX,
                "bounded": self.files.are_bounded,
                **{
                    name: [int(value) for value in _every_minute(self.times_s, series[name])]
                    for name in (SEGMENTS, DELETED_SEGMENTS)
                    if name in series
                },
            }
        if more := self.threads_last - self.threads_first:
            told["more_threads"] = dict(more)
        return told


def _every_minute(times_s: Sequence[float], values: Sequence[float]) -> list[float]:
    kept, next_s = [], 0.0
    for at_s, value in zip(times_s, values, strict=True):
        if at_s >= next_s:
            kept.append(value)
            next_s = at_s + 59.0
    return kept


def resident_mb(pid: int) -> float:
    text = Path(f"/proc/{pid}/status").read_text()
    return int(next(line for line in text.splitlines() if line.startswith("VmRSS")).split()[1]) / 1024


def num_threads(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/task").iterdir()))


def thread_names(pid: int) -> Counter[str]:
    """The number of threads with each name. Names are taken without the numbers at their ends."""
    names: Counter[str] = Counter()
    for path in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):
            names[(path / "comm").read_text().strip().rstrip("0123456789_-")] += 1
    return names


def disk_mb(directory: Path) -> float:
    """MB of a directory's files, which may be deleted while they are counted."""
    nbytes = 0
    for path in directory.rglob("*"):
        with contextlib.suppress(OSError):
            nbytes += path.stat().st_blocks * 512 if path.is_file() else 0
    return nbytes / 1e6
