"""One deployment shared by all tests that only send requests, because starting one takes longer than most tests.

Tests that kill, restart or configure processes start their own deployment. The shared one keeps all data of earlier
tests: a prompt hits if another test sent it, so each test uses its own tenant or text. The ledger has records of other
tests.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
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
    """A test's view of the shared deployment. router: a client for this test."""

    def __init__(self, deployment: Deployment, router: RouterClient) -> None:
        self._deployment = deployment
        self.router = router
        before = self._settled()
        self._num_before = len(before)
        # The position in the ledger's export after other tests' records.
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
        """The ledger's records since this test began."""
        return self._settled()[self._num_before :]

    def _settled(self):
        from antefix_billing.ledger_files import read_settled

        return list(read_settled(self.config.ledger_dir))


@contextlib.contextmanager
def deployed(config: DeploymentConfig) -> Iterator[Deployment]:
    """A deployment for several tests. It has its own event loop, which outlives each test's loop."""
    from antefix.blocking import LoopThread
    from antefix_console.deployment import Deployment

    deployment = Deployment(config)
    thread = LoopThread()

    async def start() -> None:
        await deployment.start()
        await deployment.router.close()

    with contextlib.closing(thread):
        try:
            thread.run(start())
            yield deployment
        finally:
            thread.run(deployment.stop())


@pytest.fixture(scope="session")
def _deployment_of_all(tmp_path_factory):
    from antefix_console.deployment import DeploymentConfig
    from tests.small_worker_model import small_text_model

    config = DeploymentConfig(
        model=small_text_model(),
        data_dir=tmp_path_factory.mktemp("running") / "data",
        http_address="127.0.0.1:0",
        ratecards=(str(ROOT / "deploy" / "ratecards" / "example.toml"),),
        extra_flags={"kvstore": ("--budget-bytes", "256M"), "prefill": SMALL_POOL, "decode": SMALL_POOL},
    )
    with deployed(config) as deployment:
        yield deployment


@pytest.fixture
async def running(_deployment_of_all):
    from antefix.clients import RouterClient

    async with RouterClient(_deployment_of_all.one("router").address) as router:
        yield RunningDeployment(_deployment_of_all, router)
