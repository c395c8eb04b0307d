"""A fleet under load is upgraded, grows, shrinks, and loses processes: no request fails, no token differs, hits stay.

Hosts are network namespaces with TLS between all, and every role has a DNS name with several addresses. The previous
version is a commit or tag: `make test-hosts PREVIOUS=v0.2.0`; by default it is the commit before this one. The whole
test takes half an hour. `PARTS=upgrade,decode,kills` selects parts, and `UPGRADE=decode-1` upgrades only these roles.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hosts.rolling_fleet import Client, RollingFleet, environment_of
from tests.hosts.test_several_hosts import can_make_namespaces
from tests.upgrade.versions import ROOT, checkout

PREVIOUS = os.environ.get("PREVIOUS", "HEAD~1")
# docs/OPERATIONS.md, "Upgrade".
UPGRADE = os.environ.get("UPGRADE", "router-1,prefill-1,decode-1,decode-2,router-2,kvstore-1,kvstore-2").split(",")
# A role's name: the role grows by one and shrinks again.
PARTS = os.environ.get("PARTS", "upgrade,prefill,decode,kvstore,router,kills").split(",")
ROLES = ("prefill", "decode", "kvstore", "router")
ORDER = ("kvstore-1", "kvstore-2", "prefill-1", "decode-1", "decode-2", "router-1", "router-2")
NUM_KILLS = int(os.environ.get("KILLS", "8"))

pytestmark = [pytest.mark.hosts, pytest.mark.services, pytest.mark.timeout(3600)]


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[RollingFleet]:
    if not can_make_namespaces():
        pytest.skip("network namespaces cannot be made here: that needs root and iproute2")
    made = RollingFleet(tmp_path)
    try:
        made.lay()
        yield made
    finally:
        made.close()


@pytest.fixture
def previous(tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        return checkout(PREVIOUS, tmp_path_factory.mktemp("versions") / "previous")
    except subprocess.CalledProcessError:
        pytest.skip(f"there is no commit {PREVIOUS} here")


def test_roles_are_upgraded_grown_shrunk_and_killed_under_load(fleet: RollingFleet, previous: Path) -> None:
    # 1. The previous version alone. Its answers and hits are the expected ones from now on.
    for name in ORDER:
        fleet.add(name, previous)
    client = fleet.client()
    try:
        warm(client)
        # 2. One role after the other is upgraded to this version.
        for name in UPGRADE if "upgrade" in PARTS else ():
            fleet.replace(name, ROOT)
            warm(client)
        # 3. Each role gets one more process, and its first process leaves.
        for role in (each for each in PARTS if each in ROLES):
            grow_and_shrink(fleet, client, role)
        # 4. Processes of all roles are killed and restarted as by a supervisor.
        if "kills" in PARTS:
            client.tell(breaks=True)
            storm(fleet, client)
        said = client.tell(stop=True)
    finally:
        client.close()
    assert not said["failed"] and not said["wrong"]
    print(f"{len(said['sent'])} requests, {said['again']} asked again in the storm")
    # 5. The bill is complete, and nothing is billed twice.
    for host in fleet.hosts.values():
        if host.role == "router":
            fleet.stop(host.name)
    check_bill(fleet, said["sent"], num_again=said["again"])


def warm(client: Client) -> None:
    """Wait until every turn was sent twice more, and the last time all but one block at most was a hit."""
    begun = client.tell()["rounds"]
    client.until(
        lambda said: said["rounds"] >= begun + 4 and len(said["cached"]) == 4 and min(said["cached"].values()) > 500,
        "conversations continue and hit",
    )


def grow_and_shrink(fleet: RollingFleet, client: Client, role: str) -> None:
    fleet.add(f"{role}-3", ROOT)
    client.tell(doors=fleet.doors)
    warm(client)
    if role == "kvstore":
        fleet.drain_store("kvstore-1", "kvstore-2", "kvstore-3")
    if role == "router":
        client.tell(doors=[door for door in fleet.doors if not door.startswith("router-1.")])
    fleet.remove(next(name for name in fleet.hosts if name.startswith(role)))
    warm(client)


def storm(fleet: RollingFleet, client: Client) -> None:
    """Kill processes of any role while conversations continue. A lost or refused request is sent again."""
    draw = random.Random(7)
    for _ in range(NUM_KILLS):
        name = draw.choice(sorted(fleet.hosts))
        fleet.stop(name, kill=True)
        begun = client.tell()["rounds"]
        client.until(lambda said, begun=begun: said["rounds"] > begun, f"conversations continue without {name}")
        fleet.start(name)
    warm(client)


def check_bill(fleet: RollingFleet, sent: list[str], *, num_again: int) -> None:
    """num_again: requests sent again because a router died. Without a shared bill, two routers may have ended one."""
    variables, run = environment_of(ROOT), [sys.executable, "-m", "antefix_console", "usage"]

    def usage(*command: str) -> str:
        argv = [*run, *command, "--ledger", *fleet.ledgers()]
        done = subprocess.run(argv, env=variables, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    usage("verify")
    rows = [json.loads(line) for line in usage("export", "--format", "jsonl").splitlines()]
    done = Counter(row["request_id"] for row in rows if row["status"] in ("stop", "length"))
    assert set(done) == set(sent)
    assert sum(done.values()) - len(done) <= num_again
