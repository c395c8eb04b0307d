"""Two versions next to each other: roles are replaced one by one while conversations continue, and back.

No request fails, no token differs, and nothing is billed twice. The previous version is a commit or tag: `make
test-upgrade PREVIOUS=v0.2.0`. Its roles run that version's own code from a separate tree.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.upgrade.conversations import Talk
from tests.upgrade.versions import ROOT, Deployment, checkout

# The last commit before the formats of 0.2.0 were fixed. Use the last tag once there is one.
PREVIOUS = os.environ.get("PREVIOUS", "810078c")
# A role starts before the roles that call it.
ORDER = ("kvstore", "prefill-1", "decode-1", "router-0", "router-1")
# The order of docs/OPERATIONS.md, "Upgrade". It also works if the versions name KV differently, so that their routers
# refuse each other's workers. A new router has no workers until new ones come. Old workers serve until the old router
# stops.
UPGRADE = ("router-0", "prefill-1", "decode-1", "router-1", "kvstore")

pytestmark = [pytest.mark.upgrade, pytest.mark.services, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def previous(tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        return checkout(PREVIOUS, tmp_path_factory.mktemp("versions") / "previous")
    except subprocess.CalledProcessError:
        pytest.skip(f"there is no commit {PREVIOUS} here")


@pytest.fixture
def deployment(tmp_path: Path) -> Iterator[Deployment]:
    made = Deployment(tmp_path)
    try:
        yield made
    finally:
        made.stop()


@pytest.mark.parametrize("order", [UPGRADE], ids=["half of the routers first"])
def test_roles_are_replaced_while_conversations_go_on_and_back(
    deployment: Deployment, previous: Path, order: tuple[str, ...]
) -> None:
    # 1. The previous version alone. Its answers are the expected ones from now on.
    for name in ORDER:
        deployment.start(name, previous)
    for door in deployment.doors:
        deployment.wait_ready(door)
    talk = Talk(deployment.doors)
    talk.once()
    # 2. Upgrade and downgrade, with at least one whole round of each conversation in every mixture of versions.
    talk.start()
    try:
        for tree, names in ((ROOT, order), (previous, order[:-1])):
            # The store is not downgraded, because an older version may refuse a store that a newer one has opened.
            for name in names:
                deployment.replace(name, tree)
                _go_on(talk)
    finally:
        talk.stop()
    assert not talk.failed
    assert not talk.wrong
    # 3. The bill has each request once, and its chain is intact.
    for name in ("router-0", "router-1"):
        deployment.running[name].stop()
    _check_bill(deployment.directory, talk)


def _go_on(talk: Talk) -> None:
    """Wait until at least one whole round has begun and ended since this call."""
    until, begun = talk.rounds + 2, len(talk.failed)
    while talk.rounds < until and len(talk.failed) == begun:
        talk._stop.wait(0.1)
    assert not talk.failed
    assert not talk.wrong


def _check_bill(directory: Path, talk: Talk) -> None:
    ledgers = [str(directory / f"ledger-{number}") for number in range(2)]
    run = [sys.executable, "-m", "antefix_console", "usage"]
    verified = subprocess.run([*run, "verify", "--ledger", *ledgers], capture_output=True, text=True, check=False)
    assert verified.returncode == 0, verified.stdout + verified.stderr
    exported = subprocess.run(
        [*run, "export", "--format", "jsonl", "--ledger", *ledgers], capture_output=True, text=True, check=True
    )
    billed = Counter(json.loads(line)["request_id"] for line in exported.stdout.splitlines())
    assert set(billed) == set(talk.sent)
    assert max(billed.values()) == 1
