"""The number of threads follows the process' limits, not the host's cores."""

import os
import re
import resource
from pathlib import Path

import pytest

from antefix.host_limits import map_bytes_of, memory_limit_bytes, usable_cores

V2 = "31 23 0:28 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n"
V1 = (
    "32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"
    "35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
)


@pytest.fixture
def host(tmp_path, monkeypatch):
    """A host with 64 cores, given as a dictionary of files by path."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))

    def make(**files):
        for path, text in files.items():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text(text)
        return tmp_path

    return lambda cgroup, mounts, files: make(
        **{"proc/self/cgroup": cgroup, "proc/self/mountinfo": mounts},
        **{f"sys/fs/cgroup/{path}": text for path, text in files.items()},
    )


@pytest.mark.parametrize(
    ("quota", "cores"),
    [("100000 100000", 1), ("150000 100000", 2), ("50000 100000", 1), ("max 100000", 64), ("", 64), ("7 x", 64)],
)
def test_a_quota_of_version_2_counts_in_any_group_above(host, quota, cores):
    for path in ("a/b/cpu.max", "a/cpu.max"):
        assert usable_cores(host("0::/a/b\n", V2, {"a/cpu.max": "max 100000", path: quota})) == cores


@pytest.mark.parametrize(("quota", "cores"), [("200000\n", 2), ("-1\n", 64), ("10000\n", 1)])
def test_a_quota_of_version_1(host, quota, cores):
    files = {"cpu,cpuacct/x/cpu.cfs_quota_us": quota, "cpu,cpuacct/x/cpu.cfs_period_us": "100000\n"}
    assert usable_cores(host("4:memory:/x\n1:cpu,cpuacct:/x\n0::/\n", V1, files)) == cores


def test_in_a_container_what_is_mounted_is_its_own_group(host):
    mounts = V2.replace("0:28 / ", "0:28 /docker/1f ")
    assert usable_cores(host("0::/docker/1f\n", mounts, {"cpu.max": "300000 100000"})) == 3
    # The control group's path on the host, which does not exist in the container.
    assert usable_cores(host("0::/kubepods/pod7\n", V2, {"cpu.max": "200000 100000"})) == 2
    assert usable_cores(host("0::/../other\n", V2, {"cpu.max": "200000 100000"})) == 2


def test_affinity_counts(host, monkeypatch):
    root = host("0::/\n", V2, {"cpu.max": "800000 100000"})
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5})
    assert usable_cores(root) == 2


def test_a_host_without_control_groups_has_what_affinity_says(tmp_path):
    assert usable_cores(tmp_path) == len(os.sched_getaffinity(0)) and memory_limit_bytes(tmp_path) is None


def test_the_lowest_limit_of_memory_counts(host):
    files = {"a/memory.max": "max\n", "memory.max": str(2 << 30), "a/memory.high": str(1 << 30)}
    assert memory_limit_bytes(host("0::/a\n", V2, files)) == 1 << 30
    files = {"memory/limit_in_bytes": "", "memory/memory.limit_in_bytes": "9223372036854771712\n"}
    assert memory_limit_bytes(host("4:memory:/\n", V1, files)) is None


@pytest.mark.parametrize(("limit", "found"), [(resource.RLIM_INFINITY, 64 << 30), (8 << 30, 2 << 30)])
def test_a_map_leaves_room_in_a_limited_address_space(monkeypatch, limit, found):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (limit, limit))
    assert map_bytes_of(64 << 30) == found


def test_nothing_else_asks_how_many_cores_the_host_has():
    root = Path(__file__).parents[2]
    rooms = ("antefix", "billing", "console", "decode", "engines", "kvstore", "prefill", "router", "simulate")
    sources = [path for room in rooms for path in (root / room).rglob("*.py") if path.name != "host_limits.py"]
    assert len(sources) > 300
    asking = [path.name for path in sources if re.search(r"\bcpu_count\(|sched_getaffinity", path.read_text())]
    assert asking == []
