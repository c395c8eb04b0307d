"""How many cores and how much memory this process may use, by affinity, control groups (v1, v2) and resource limits.

A container sees all cores and memory of its host but may use only a part. With more threads than usable cores, threads
wait for each other at the end of every parallel loop: with a quota of one core on a host of 64, a hit took six times as
long.
"""

from __future__ import annotations

import math
import os
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Final

_ROOT: Final = Path("/")
# Control groups version 1 express "no limit" as the largest number of whole pages.
_NO_LIMIT: Final = 1 << 60


def usable_cores(root: Path = _ROOT) -> int:
    """How many threads of this process can run at once, at least 1. A quota of 1.5 cores counts as 2, because the
    second thread can run half of the time.

    root: the directory that holds /proc and /sys; tests pass another one.
    """
    try:
        cores = len(os.sched_getaffinity(0))
    except (AttributeError, OSError):  # not on macOS
        cores = os.cpu_count() or 1
    quota = min(_quotas(root), default=math.inf)
    return max(1, min(cores, math.ceil(quota) if quota < cores else cores))


def memory_limit_bytes(root: Path = _ROOT) -> int | None:
    """The memory limit of this process's control groups; None: no limit but the host's memory."""
    return min((number for number in _memory_limits(root) if number < _NO_LIMIT), default=None)


def address_space_limit_bytes() -> int | None:
    """What `ulimit -v` allows this process and those that it starts; None: no limit."""
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    return None if soft == resource.RLIM_INFINITY else soft


def map_bytes_of(wanted: int) -> int:
    """Address space to map a growing file: `wanted`, or a quarter of what `ulimit -v` leaves if that is less."""
    limit_bytes = address_space_limit_bytes()
    return wanted if limit_bytes is None else min(wanted, limit_bytes // 4 // 4096 * 4096)


def _quotas(root: Path) -> Iterator[float]:
    for group in _groups(root, "cpu"):
        for line in _lines(group / "cpu.max"):
            quota, _, period = line.partition(" ")
            yield _ratio(quota, period)
        for quota, period in zip(_lines(group / "cpu.cfs_quota_us"), _lines(group / "cpu.cfs_period_us"), strict=False):
            yield _ratio(quota, period)


def _ratio(quota: str, period: str) -> float:
    """Cores of a quota. "max", and -1 in version 1 of control groups, mean that there is no quota."""
    try:
        return int(quota) / int(period) if int(quota) > 0 and int(period) > 0 else math.inf
    except ValueError:
        return math.inf


def _memory_limits(root: Path) -> Iterator[int]:
    for group in _groups(root, "memory"):
        for name in ("memory.max", "memory.high", "memory.limit_in_bytes"):
            yield from (int(line) for line in _lines(group / name) if line.isdigit())


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """The directories of this process's control group for a controller and of its ancestors. The limit of each applies.

    In a container, the path of the control group may be the host's path, which does not exist there. Then the mounted
    directory itself is the container's control group.
    """
    paths = {"": "/"}
    for line in _lines(root / "proc/self/cgroup"):
        _, names, path = [*line.split(":", 2), "", ""][:3]
        paths.update(dict.fromkeys(names.split(","), path))
    for line in _lines(root / "proc/self/mountinfo"):
        fields, _, more = line.partition(" - ")
        kind, _, options = [*more.split(" ", 2), "", ""][:3]
        if kind == "cgroup2":
            path = paths[""]
        elif kind == "cgroup" and controller in options.split(","):
            path = paths.get(controller, "/")
        else:
            continue
        inside, mounted = fields.split(" ")[3:5]
        yield from _upwards(root / mounted.lstrip("/"), os.path.relpath(path, inside))


def _upwards(mounted: Path, path: str) -> Iterator[Path]:
    parts = [part for part in Path(path).parts if part not in ("/", ".")]
    if ".." in parts:
        parts = []
    for length in range(len(parts), -1, -1):
        yield mounted.joinpath(*parts[:length])


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(errors="replace").splitlines()
    except OSError:
        return []
