"""Cold restores next to every reader of the disk, in short rounds in turn: which reader is the best, and how much of
its rate a restore gets. benchmarks/store.py calls this.

A virtual disk's rate changes by half within seconds. So each reader is compared with the restores just before and just
after it, and the limit is the reader with the lowest median of such ratios. The first rounds have all readers, the
others only the best ones.
"""

from __future__ import annotations

import random
import shutil
import statistics
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from benchmarks.fio_limits import READERS, WRITERS, fio_rate
from benchmarks.spread import median_interval, over_neighbours, with_spread
from benchmarks.store_limits import DIRECT_READERS, direct_read, drop_cache, seconds

MIB = 1 << 20
# Rounds that all readers take part in, and how many readers take part in the rounds after these.
ROUNDS_OF_ALL = 6
NUM_BEST = 4

# Each returns bytes per second.
Readers = Mapping[str, Callable[[], float]]


def disk_readers(directory: Path, raw: Path, *, with_fio: bool) -> dict[str, Callable[[], float]]:
    """Python's direct readers of the file `raw`, and fio's readers of a file as long, which is written here."""
    nbytes = raw.stat().st_size

    def direct(depth: int, mib: int) -> float:
        drop_cache(raw.parent)
        return nbytes / direct_read(raw, depth=depth, piece_bytes=mib * MIB)

    found: dict[str, Callable[[], float]] = {
        f"direct_{depth}x{mib}mib": partial(direct, depth, mib) for depth, mib in DIRECT_READERS
    }
    if with_fio:
        fio_rate(directory, next(iter(WRITERS)), nbytes)
        found |= {name: partial(fio_rate, directory, name, nbytes) for name in READERS}
    return found


def next_to_readers(restore: Callable[[], float], readers: Readers, rounds: int) -> dict[str, list[float]]:
    """By reader, the ratio of each of its rounds: the mean rate of the two restores around it over the reader's own.

    restore: a cold restore; returns bytes per second.
    """
    found: dict[str, list[float]] = {name: [] for name in readers}
    for number in range(rounds):
        names, limits, ours = list(readers), [], [restore()]
        if number >= ROUNDS_OF_ALL:
            names = sorted(names, key=lambda name: statistics.median(found[name][:ROUNDS_OF_ALL]))[:NUM_BEST]
        random.Random(number).shuffle(names)
        for name in names:
            limits.append(readers[name]())
            ours.append(restore())
        for name, reader_over_restores in zip(names, over_neighbours(limits, ours), strict=True):
            found[name].append(1 / reader_over_restores)
    return found


def cold_figures(found: Mapping[str, list[float]]) -> dict[str, float | str]:
    """Of the reader that leaves the restore the lowest median ratio: the ratio, with its spread and 95% limits."""
    num_rounds = max(map(len, found.values()))
    best = min(
        (name for name, ratios in found.items() if len(ratios) == num_rounds),
        key=lambda name: statistics.median(found[name]),
    )
    low, high = median_interval(found[best])
    out: dict[str, float | str] = {"best_reader": best, "restore_over_best_reader_rounds": len(found[best])}
    out |= {"restore_over_best_reader_from": low, "restore_over_best_reader_to": high}
    out |= with_spread("restore_over_best_reader", found[best])
    return out | {f"restore_over_{name}": statistics.median(ratios) for name, ratios in found.items()}


def measure_cold(
    place: Path, read_blocks: Callable[[], int], num_blocks: int, raw: Path, rounds: int, *, with_fio: bool
) -> dict[str, float | str]:
    """read_blocks: restores `num_blocks` blocks, as many bytes as `raw` has, of the store in `place`; returns how many
    were good. fio's file and `raw` are on the same disk.
    """
    nbytes = raw.stat().st_size

    def restore() -> float:
        drop_cache(place)
        good: list[int] = []
        elapsed_s = seconds(lambda: good.append(read_blocks()))
        assert good == [num_blocks], f"{good} of {num_blocks} blocks were restored"
        return nbytes / elapsed_s

    of_fio = raw.parent / "fio"
    of_fio.mkdir()
    found = next_to_readers(restore, disk_readers(of_fio, raw, with_fio=with_fio), rounds)
    shutil.rmtree(of_fio)
    return cold_figures(found)
