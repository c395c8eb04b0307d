"""Which descriptors a soak test counts as leaked, and which as held by a cache with a bound."""

import math
import os
import random
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.soak_files import kind_of, kinds_of, num_segments, targets_of
from benchmarks.soak_samples import Samples

# An hour, one sample per 10 s.
TIMES = [10.0 * number for number in range(361)]
WARM_UP_S = 600.0
STORE = "/data/store/segments"
ALWAYS = ["socket:[1]", "socket:[2]", "pipe:[3]", "anon_inode:[eventpoll]", "/data/logs/decode-1.log", "/dev/null"]


def samples_of(targets: Callable[[float], list[str]], num_bound: Callable[[float], int] = lambda _: 16) -> Samples:
    samples = Samples(warm_up_s=WARM_UP_S)
    for at_s in TIMES:
        samples.add(at_s, memory_mb=100.0)
        samples.files.add(at_s, [*ALWAYS, *targets(at_s)], num_bound(at_s))
    return samples


def of(kind: str, number: float) -> list[str]:
    return [f"{kind}:[{100 + each}]" for each in range(math.floor(number))]


def segments(number: int) -> list[str]:
    return [f"{STORE}/{each:08}.seg" for each in range(number)]


def not_flat(samples: Samples) -> set[str]:
    return {
        name for name, found in samples.figures().items() if isinstance(found, dict) and not found.get("flat", True)
    }


def test_a_process_that_opens_nothing_is_flat():
    samples = samples_of(lambda _: [])
    assert samples.is_flat
    assert not_flat(samples) == set()


@pytest.mark.parametrize("kind", ["socket", "pipe", "anon_inode"])
def test_one_more_descriptor_per_ten_minutes_is_a_leak(kind):
    samples = samples_of(lambda at_s: of(kind, at_s / 600))
    assert not samples.is_flat
    assert "files" in not_flat(samples)


@pytest.mark.parametrize("scatter", [2.0, 8.0, 20.0])
def test_scatter_does_not_excuse_a_leak(scatter):
    """Sockets come and go with the requests, and one per ten minutes stays."""
    draw = random.Random(3)
    samples = samples_of(lambda at_s: of("socket", at_s / 600 + draw.uniform(0, scatter)))
    assert not samples.is_flat


def test_a_cache_of_segments_may_go_up_and_down_below_its_bound():
    """The numbers per five minutes of a worker in a soak of an hour."""
    opened = [0, 13, 12, 12, 9, 6, 5, 3, 4, 6, 7, 9, 9]
    samples = samples_of(lambda at_s: segments(opened[int(at_s // 300)]))
    assert samples.is_flat
    assert samples.figures()["bounded_files"]["segments_max"] == 13


def test_more_segments_than_the_store_has_are_a_leak():
    samples = samples_of(lambda at_s: segments(17 if at_s == 1800 else 3))
    assert not samples.is_flat
    assert not samples.figures()["bounded_files"]["bounded"]


def test_a_segment_that_is_opened_again_and_again_is_a_leak_below_the_bound():
    samples = samples_of(lambda at_s: segments(1) * (1 + math.floor(at_s / 600)))
    assert samples.files.num_segments_max == 1
    assert {"segments again", "files"} <= not_flat(samples)


def test_a_deleted_segment_must_be_closed_soon():
    gone = f"{STORE}/00000007.seg (deleted)"
    assert samples_of(lambda at_s: [gone] if 1800 <= at_s <= 1820 else []).is_flat
    kept = samples_of(lambda at_s: [gone] if at_s >= 1800 else [])
    assert not kept.is_flat
    assert kept.files.deleted_open_s == 1800


def test_many_deleted_segments_that_are_each_closed_are_no_leak():
    samples = samples_of(lambda at_s: [f"{STORE}/{at_s:08.0f}.seg (deleted)"])
    assert samples.is_flat
    assert samples.files.deleted_open_s == 0


def test_a_leak_that_is_spread_over_kinds_is_a_leak_in_all():
    each = [(kind, 1200.0 + 900 * number) for number, kind in enumerate(("socket", "pipe", "anon_inode"))]
    samples = samples_of(lambda at_s: [target for kind, since_s in each if at_s >= since_s for target in of(kind, 1)])
    assert not_flat(samples) == {"files"}


def test_a_store_whose_files_become_more_is_not_flat():
    samples = Samples(warm_up_s=WARM_UP_S)
    for at_s in TIMES:
        samples.add(at_s, disk_mb=1.0, **{"segment files": 16.0 + math.floor(at_s / 600)})
    assert not_flat(samples) == {"segment files"}


def test_descriptors_of_this_process_have_kinds(tmp_path):
    directory = tmp_path / "segments"
    directory.mkdir()
    for number in (1, 2):
        (directory / f"{number:08}.seg").write_bytes(b"")
    reading, writing = os.pipe()
    with (
        socket.socket(),
        (directory / "00000001.seg").open("rb") as first,
        (directory / "00000001.seg").open("rb"),
        (directory / "00000002.seg").open("rb"),
    ):
        (directory / "00000002.seg").unlink()
        targets = targets_of(os.getpid())
        kinds = kinds_of(targets)
        assert kind_of(str(Path(f"/proc/self/fd/{first.fileno()}").readlink())) == "segments"
        assert (kinds["segments"], kinds["segments again"], kinds["deleted segments"]) == (1, 1, 1)
        assert (kinds["sockets"] >= 1, kinds["pipes"] >= 2) == (True, True)
        assert kinds.total() == len(targets)
        assert num_segments(tmp_path) == 1
    os.close(reading)
    os.close(writing)


@pytest.mark.parametrize(
    ("target", "kind"),
    [
        ("/data/store/index/data.mdb", "index"),
        ("/data/ledger/usage-1.ledger", "ledger"),
        ("/data/logs/decode-1.log (deleted)", "logs"),
        ("/memfd:torch (deleted)", "shared memory"),
        ("anon_inode:[eventfd]", "events"),
        ("/dev/urandom", "devices"),
        ("/data/secret", "other files"),
    ],
)
def test_kinds(target, kind):
    assert kind_of(target) == kind
