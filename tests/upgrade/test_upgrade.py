"""Two versions next to each other: roles are replaced one by one while conversations continue, and back.

No request fails, no token differs, nothing is billed twice. The version before is a commit or tag: `make test-upgrade
PREVIOUS=v0.2.0`. It runs the previous version's own code, from a tree of its own.
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

# The last commit before the formats of 0.2.0 were settled; the last tag, once there is one.
PREVIOUS = os.environ.get("PREVIOUS", "810078c")
# What is asked before what asks.
ORDER = ("kvstore", "prefill-1", "decode-1", "router-0", "router-1")
# docs/OPERATIONS.md, "Upgrade": works also where the versions name KV differently, so that neither's routers take the
# other's workers. A new router has nothing until new workers come; old ones serve until the old router goes.
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
    # 1. The previous version alone; what it answers is what is expected from now on.
    for name in ORDER:
        deployment.start(name, previous)
    for door in deployment.doors:
        deployment.wait_ready(door)
    talk = Talk(deployment.doors)
    talk.once()
    # 2. Forward and back, with at least one whole round of each conversation in every mixture.
    talk.start()
    try:
        for tree, names in ((ROOT, order), (previous, order[:-1])):
            # Not the store on the way back: what a newer version has opened, an older one may refuse.
            for name in names:
                deployment.replace(name, tree)
                _go_on(talk)
    finally:
        talk.stop()
    assert not talk.failed
    assert not talk.wrong
    # 3. The bill: each request once, and the chain whole.
    for name in ("router-0", "router-1"):
        deployment.running[name].stop()
    _check_bill(deployment.directory, talk)


def _go_on(talk: Talk) -> None:
    """Until more rounds are done than can have been under way."""
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
