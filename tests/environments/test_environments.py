"""Antefix answers and hits in all these environments, or says in one line what is missing: `make test-environments`."""

from __future__ import annotations

import contextlib
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.child_environment import child_environment
from tests.environments.deployment_in import Place, needs_root, opened_to_all, refused, up

pytestmark = [pytest.mark.environments, pytest.mark.services, pytest.mark.timeout(900)]

DEAD_PROXY = "http://127.0.0.1:1"
PROXIES = [f"{kind}_proxy" for kind in ("http", "https", "grpc", "all")]
# Only the data directory can be written, as with `docker run --read-only` and a volume.
READ_ONLY_ROOT = """
for mounted in / /tmp /var/tmp /dev/shm; do
  mount --bind "$mounted" "$mounted" && mount -o remount,bind,ro "$mounted"
done
mount -t tmpfs tmpfs /mnt
DATA=/mnt/data
"""


@pytest.fixture
def data_dir(tmp_path):
    return tmp_path / "data"


@pytest.mark.parametrize(
    ("variables", "unset"),
    [
        ({}, ()),
        ({name: DEAD_PROXY for each in PROXIES for name in (each, each.upper())}, ("no_proxy", "NO_PROXY")),
        ({"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}, ()),
        ({"LC_ALL": "en_US.ISO-8859-1", "PYTHONIOENCODING": "latin-1"}, ()),
        ({}, ("LANG", "LC_ALL", "HOME", "USER", "LOGNAME", "XDG_CACHE_HOME")),
        ({"HOME": "/nonexistent", "TMPDIR": "/nonexistent", "TZ": "Asia/Kathmandu"}, ()),
        ({"TZ": "no/such zone", "PYTHONOPTIMIZE": "2", "PYTHONHASHSEED": "1"}, ()),
    ],
    ids=["plain", "proxies", "posix-locale", "latin-1", "nothing-set", "no-home", "odd-zone"],
)
def test_variables(data_dir, variables, unset):
    with up(Place(data_dir=data_dir, variables=variables, unset=unset)) as running:
        running.check_answers()


@pytest.mark.parametrize("mask", ["0", "0777"])
def test_umask(data_dir, mask):
    with up(Place(data_dir=data_dir, shell=f"umask {mask}")) as running:
        running.check_answers()
    assert not [
        path for path in (data_dir, *data_dir.rglob("*")) if path.stat().st_mode & 0o077 and not path.is_socket()
    ]


@pytest.mark.parametrize(
    "name", [b"with space", "Zürich 東".encode(), b"\xff\xfe data", b"a'b\"c$d", b"two\nlines"], ids=repr
)
def test_names_of_data_directories(tmp_path, name):
    with up(Place(data_dir=tmp_path / os.fsdecode(name))) as running:
        running.check_answers()


def test_ipv6(data_dir):
    with up(Place(data_dir=data_dir, flags=("--address", "[::1]:0", "--http-address", "[::1]:0"))) as running:
        running.check_answers()


def test_an_ipv6_address_without_brackets_is_named(data_dir):
    assert "brackets, as in [::1]" in refused(Place(data_dir=data_dir, flags=("--address", "::1:17011")))


def test_a_read_only_root_without_a_temporary_directory(data_dir):
    needs_root("unshare")
    with up(Place(data_dir=data_dir, shell=READ_ONLY_ROOT, unset=("TMPDIR",))) as running:
        running.check_answers()


def test_an_unprivileged_user(data_dir):
    needs_root("setpriv")
    data_dir.mkdir()
    os.chown(data_dir, 65534, 65534)
    for parent in data_dir.parents[:3]:
        parent.chmod(0o755)
    wrap = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--no-new-privs")
    shell = opened_to_all(sys.base_prefix, sys.prefix, Path(__file__).parents[2])
    # Run Python as that user first, because files of this Python or of the checkout may be closed to other users.
    probe = shlex.join([*wrap, sys.executable, "-P", "-c", "import antefix_console.commands.up"])
    command = ["unshare", "--mount", "bash", "-c", f"set -e\n{shell}\nexec {probe}"]
    if subprocess.run(command, capture_output=True, check=False, env=child_environment(), cwd="/").returncode:
        pytest.skip("other users can read neither this Python nor the checkout")
    with up(Place(data_dir=data_dir, shell=shell, wrap=wrap, unset=("HOME",))) as running:
        running.check_answers()
        owners = {path.stat().st_uid for path in data_dir.rglob("*")}
    assert owners == {65534}


def test_small_shared_memory():
    needs_root("unshare")
    small = "mount -t tmpfs -o size=64k tmpfs /dev/shm"
    # Tests' files lie in /dev/shm, where this mount would hide the data directory.
    with (
        tempfile.TemporaryDirectory(dir="/var/tmp") as name,
        up(Place(data_dir=Path(name) / "data", shell=small)) as running,
    ):
        running.check_answers()


@pytest.mark.parametrize("limit", ["ulimit -n 128", "ulimit -c 0; ulimit -l 0", "ulimit -s 1024", "ulimit -v 16000000"])
def test_limits(data_dir, limit):
    with up(Place(data_dir=data_dir, shell=limit)) as running:
        running.check_answers()


def test_too_little_address_space_is_said(data_dir):
    said = refused(Place(data_dir=data_dir, shell="ulimit -v 1500000"))
    assert "address space" in said or "memory" in said.lower(), said


@contextlib.contextmanager
def cpu_group(quota_us: int):
    """The directory of a control group, of version 1 or 2, with this CPU quota per 100 ms."""
    root = Path("/sys/fs/cgroup")
    v2 = (root / "cgroup.controllers").exists()
    group = (root if v2 else root / "cpu") / f"antefix-test-{os.getpid()}"
    try:
        group.mkdir()
        (group / ("cpu.max" if v2 else "cpu.cfs_quota_us")).write_text(f"{quota_us} 100000" if v2 else str(quota_us))
    except OSError as err:
        with contextlib.suppress(OSError):
            group.rmdir()
        pytest.skip(f"control groups cannot be made here: {err}")
    try:
        yield group
    finally:
        group.rmdir()


@pytest.mark.parametrize("limit", ["quota", "affinity"])
def test_threads_follow_quota_and_affinity(data_dir, limit):
    needs_root("taskset")
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs two cores, to be given one")
    with contextlib.ExitStack() as stack:
        if limit == "quota":
            group = stack.enter_context(cpu_group(100_000))
            place = Place(data_dir=data_dir, shell=f"echo $$ > {group}/cgroup.procs", flags=("--num-prefill", "0"))
        else:
            one = str(min(os.sched_getaffinity(0)))
            place = Place(data_dir=data_dir, wrap=("taskset", "-c", one), flags=("--num-prefill", "0"))
        with up(place) as running:
            running.check_answers()
            command = running.command_line("decode")
            assert command[command.index("--threads") + 1] == "1"


def test_a_disk_that_is_full_at_the_first_start_leaves_nothing_half_made(data_dir):
    needs_root("unshare")
    data_dir.mkdir()
    shell = 'mount -t tmpfs -o size=8k,nr_inodes=64 tmpfs "$DATA"; dd if=/dev/zero of="$DATA/filler" bs=4k || true'
    said = refused(Place(data_dir=data_dir, shell=f"{shell}; trap 'ls -s \"$DATA\" >&2' EXIT"))
    assert "No space left" in said and f"{data_dir}/secret" in said, said


def test_a_second_start_keeps_what_the_first_one_logged(data_dir):
    with up(Place(data_dir=data_dir)) as running:
        running.check_answers()
    first = {path.name: path.read_bytes() for path in (data_dir / "logs").glob("*.log")}
    for _ in range(2):
        with up(Place(data_dir=data_dir)):
            pass
    assert first
    for name, told in first.items():
        assert (data_dir / "logs" / name).read_bytes().startswith(told)
