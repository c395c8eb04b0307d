"""Stand-in workers behind a real fleet router, with real HTTP and real ZeroMQ, in one process."""

import asyncio
import contextlib

import httpx
import pytest

from antefix.secret import Keyring
from antefix_router.fleet.fleet_config import FleetConfig
from antefix_router.fleet.fleet_door import PATHS, build_fleet_app
from antefix_router.fleet.fleet_router import FleetRouter
from antefix_router.gateway.access import HttpMeasures
from antefix_router.gateway.app import serve_door
from tests.fleet.standin import MODEL, Standin
from tests.waiting import AT_MOST_S, until


class Fleet:
    """A router, its workers and a client."""

    def __init__(self, router, http, workers):
        self.router = router
        self.http = http
        self.workers = workers
        self.client = httpx.AsyncClient(base_url=f"http://{http.address}", timeout=AT_MOST_S, trust_env=False)

    async def chat(self, text, *, expect=200, headers=None, **more):
        messages = text if isinstance(text, list) else [{"role": "user", "content": text}]
        body = {"model": MODEL, "messages": messages, "max_tokens": 3, **more}
        answer = await self.client.post("/v1/chat/completions", json=body, headers=headers or {})
        assert answer.status_code == expect, answer.text
        return answer

    def engine(self, worker):
        return next(each for each in self.router.engines.engines if each.place.address == worker.address)

    def is_told(self, worker):
        following = self.engine(worker).subscriber
        return following is None or (following.in_step and (following._next or 0) == worker.publisher.number)

    async def heard(self, condition=None):
        """Wait until the router has received all workers' events, and the condition holds."""

        def is_heard():
            told = all(self.is_told(worker) for worker in self.workers if worker.publisher is not None)
            return told and (condition is None or condition())

        await until(is_heard, "the router has heard it")

    async def heard_down(self, worker):
        """Wait until the router has noticed that the worker is down."""
        await until(lambda: not (self.engine(worker).is_up or self.engine(worker).tells))
        await asyncio.sleep(0.15)  # the router checks the worker's health once more

    @property
    def records(self):
        from antefix_billing.ledger_files import read_settled

        return [item.record for item in read_settled(self.router.front.accounts.ledger.directory)]


@pytest.fixture
async def fleet(tmp_path, monkeypatch):
    """fleet(*workers, **settings) -> a started Fleet."""
    # Router and workers share one event loop. On a busy machine it is late for all, so lateness must not count as down.
    monkeypatch.setattr("antefix_router.fleet.openai_door._ASK_S", 60.0)
    async with contextlib.AsyncExitStack() as stack:

        async def start(*workers, **settings):
            for worker in workers:
                if worker.is_stopped:
                    await worker.start()
            stack.push_async_callback(lambda: asyncio.gather(*(worker.stop() for worker in workers)))
            publishers = [worker.publisher for worker in workers]
            events = {}
            if all(publishers):
                events = {
                    "events": tuple(each.events for each in publishers),
                    "replay": tuple(each.replay for each in publishers),
                }
            config = FleetConfig(
                **{
                    "workers": tuple(worker.url for worker in workers),
                    "http_address": "127.0.0.1:0",
                    "secret_file": str(tmp_path / "secret"),
                    "ledger_dir": str(tmp_path / "ledger"),
                    "health_s": 0.1,
                    **events,
                    **settings,
                }
            )
            router = FleetRouter(config, Keyring(b"0123456789abcdef"))
            for engine in router.engines.engines:
                if engine.subscriber is not None:
                    engine.subscriber._quiet_s = 0.2
            await router.start()
            measures = HttpMeasures([*PATHS])
            http = await serve_door(router.door, build_fleet_app(router.door, config, measures), config, measures)
            made = Fleet(router, http, workers)

            async def end():
                await made.client.aclose()
                await asyncio.gather(http.stop(), *(worker.stop() for worker in workers))
                await router.close()

            stack.push_async_callback(end)
            await made.heard()
            return made

        yield start


@pytest.fixture
def two():
    return Standin(), Standin()
