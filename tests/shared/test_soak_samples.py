"""Which series a soak test counts as flat, and which as growing."""

import math
import os
import random

import pytest

from benchmarks.soak_samples import Samples, disk_mb, growth

TIMES = [10.0 * number for number in range(361)]


def test_noise_and_saw_teeth_are_flat():
    draw = random.Random(1)
    memory = [100 + draw.gauss(0, 0.5) for _ in TIMES]
    files = [20 + number % 7 for number in range(len(TIMES))]
    assert growth("memory_mb", TIMES, memory).is_flat
    assert growth("files", TIMES, files).is_flat


def test_one_thread_more_is_no_growth_whenever_it_comes_and_two_are():
    for at_s in (1900, 2700, 3500):
        assert growth("threads", TIMES, [13 + (at >= at_s) for at in TIMES]).is_flat
    assert not growth("threads", TIMES, [13 + (at >= 2400) + (at >= 3000) for at in TIMES]).is_flat


def test_what_fills_up_in_the_first_half_is_flat():
    assert growth("disk_mb", TIMES, [min(at, 1000.0) for at in TIMES]).is_flat


def test_a_warm_up_that_is_too_short_shows_growth():
    filling = [min(at, 1000.0) for at in TIMES]
    assert growth("disk_mb", TIMES, filling, 1000.0).is_flat
    assert not growth("disk_mb", TIMES, filling, 300.0).is_flat


@pytest.mark.parametrize(
    ("kind", "at_first", "per_h"), [("memory_mb", 300, 16), ("files", 20, 6), ("threads", 13, 5), ("disk_mb", 3, 7)]
)
def test_a_leak_is_growth_in_spite_of_noise(kind, at_first, per_h):
    draw = random.Random(2)
    found = growth(kind, TIMES, [at_first + per_h * at / 3600 + draw.gauss(0, 0.5) for at in TIMES])
    assert not found.is_flat
    assert found.per_h == pytest.approx(per_h, rel=0.2)
    assert found.rise == pytest.approx(per_h / 2, rel=0.2)


def test_what_grows_makes_its_samples_not_flat_and_says_which():
    samples = Samples()
    for at in TIMES:
        samples.add(at, memory_mb=100.0, threads=math.floor(10 + at / 300))
    told = samples.figures()
    assert (samples.is_flat, told["memory_mb"]["flat"], told["threads"]["flat"]) == (False, True, False)
    assert len(told["threads"]["samples"]) == 61


def test_a_process_and_a_directory_are_measured(tmp_path):
    samples = Samples()
    samples.add_process(0.0, os.getpid(), tmp_path)
    samples.add_process(1.0, 2**22 + 1, tmp_path)  # no process has this id
    assert len(samples.times_s) == len(samples.files.kinds) == 1
    assert samples.figures()["files"]["first"] > 0
    assert all(values[0] > 0 for values in samples.values.values())
    assert sum(samples.threads_last.values()) == samples.values["threads"][0]
    assert "more_threads" not in samples.figures()
    (tmp_path / "file").write_bytes(bytes(1 << 20))
    assert disk_mb(tmp_path) >= 1.0
