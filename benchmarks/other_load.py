"""How much processor time programs outside a measurement took meanwhile: without it, a disturbed run looks like a slow
system.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from benchmarks.processor_time import PROC, TICK_S, cpu_s

# Of the first line of /proc/stat: user, nice, system, irq, softirq and steal. Idle time and waits for disks are not
# busy, and a guest's time is in `user` already.
_BUSY_FIELDS = (1, 2, 3, 6, 7, 8)


class OtherLoad:
    """Measures, from one call of `lap_s` to the next, the processor time that other programs took on this machine. Time
    that the machine's own host took from it counts too.
    """

    def __init__(self, pids: Callable[[], Iterable[int]], *, proc: Path = PROC) -> None:
        """pids: returns the measured processes that live now, with the one that measures."""
        self._pids = pids
        self._proc = proc
        self._busy_s, self._own_s = self._read()

    def lap_s(self) -> float:
        """Seconds of all cores together since the last call."""
        busy_s, own_s = self._read()
        # A process that has ended takes its time with it, so only the others' growth counts.
        own_grown_s = sum(max(0.0, seconds - self._own_s.get(pid, 0.0)) for pid, seconds in own_s.items())
        others_s = busy_s - self._busy_s - own_grown_s
        self._busy_s, self._own_s = busy_s, own_s
        return max(0.0, others_s)

    def _read(self) -> tuple[float, dict[int, float]]:
        fields = (self._proc / "stat").read_text().splitlines()[0].split()
        busy_s = TICK_S * sum(int(fields[number]) for number in _BUSY_FIELDS)
        return busy_s, {pid: self._cpu_s(pid) for pid in self._pids()}

    def _cpu_s(self, pid: int) -> float:
        try:
            return cpu_s(pid, proc=self._proc)
        except OSError:
            return 0.0  # it has ended
