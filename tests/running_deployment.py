"""One deployment for all tests that only ask it something: its start and its stop cost more than most of their work.

Tests that kill, restart or configure start their own. Here everything that others did is still there: prompts are hit
where they were asked before, so a test has a tenant or a text of its own, and the ledger holds others' records.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    # Each process of a run imports this file, and few of them start a deployment.
    from antefix.clients import RouterClient
    from antefix_console.deployment import Deployment, DeploymentConfig

ROOT = Path(__file__).parents[1]
SMALL_POOL = ("--pool-bytes", "64M")


class RunningDeployment:
    """What a test sees of it. router: a client for this test."""

    def __init__(self, deployment: Deployment, router: RouterClient) -> None:
        self._deployment = deployment
        self.router = router
        before = self._settled()
        self._num_before = len(before)
        # Where the ledger's export continues behind what others did.
        self.cursor = before[-1].sequence if before else 0

    @property
    def config(self) -> DeploymentConfig:
        return self._deployment.config

    @property
    def url(self) -> str:
        return f"http://{self.one('router').http_address}"

    def one(self, role):
        return self._deployment.one(role)

    def settled(self):
        """What the ledger got since this test began."""
        return self._settled()[self._num_before :]

    def _settled(self):
        from antefix_billing.ledger_files import read_settled

        return list(read_settled(self.config.ledger_dir))


@pytest.fixture(scope="session")
def _deployment_of_all(tmp_path_factory):
    from antefix.blocking import LoopThread
    from antefix_console.deployment import Deployment, DeploymentConfig

    deployment = Deployment(
        DeploymentConfig(
            model=ROOT / "models" / "antefix-tiny",
            data_dir=tmp_path_factory.mktemp("running") / "data",
            http_address="127.0.0.1:0",
            ratecards=(str(ROOT / "deploy" / "ratecards" / "example.toml"),),
            extra_flags={"kvstore": ("--budget-bytes", "256M"), "prefill": SMALL_POOL, "decode": SMALL_POOL},
        )
    )
    # In a loop of its own, which outlives each test's.
    thread = LoopThread()

    async def start():
        await deployment.start()
        await deployment.router.close()

    with contextlib.closing(thread):
        try:
            thread.run(start())
            yield deployment
        finally:
            thread.run(deployment.stop())


@pytest.fixture
async def running(_deployment_of_all):
    from antefix.clients import RouterClient

    async with RouterClient(_deployment_of_all.one("router").address) as router:
        yield RunningDeployment(_deployment_of_all, router)
