"""The failures that happen while `bill_routers.py` runs: kills, clock steps, changed files, a changed price.

Each kind of failure is spread evenly over the run's progress. Processes are killed with SIGKILL and restarted at the
same addresses. Redis loses all its data when it is killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import shutil
import struct
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

from antefix.errors import AntefixError
from antefix_console.deployment import Deployment, RoleProcess
from tests.redis_servers import RedisServer

CLOCK = Path(__file__).parent / "clock_that_steps"
STEPS_S = (-3600, -600, -30, -3, 3, 30, 600, 3600)
CARD = """[[card]]
version = "price-{number}"
models = ["*"]
currency = "EUR"
effective = {effective}
prices = {{ hit = "0.0{number}", miss = "0.{number}", write = "0.02{number}", output = "0.8{number}" }}

"""
# A new price is valid from this long after its file was written.
PRICE_AHEAD_S = 12.0


class Failures:
    """Causes the failures and counts them. progress: returns how much of the run is done, from 0 to 1."""

    def __init__(
        self,
        directory: Path,
        deployment: Deployment,
        redis: RedisServer,
        progress: Callable[[], float],
        chance: random.Random,
    ) -> None:
        self.directory, self.deployment, self.redis = directory, deployment, redis
        self.progress, self.chance = progress, chance
        self.counts: Counter[str] = Counter()
        self.clock_s = self.latest_clock_s = 0
        self._clock_stands = asyncio.Lock()
        self.number_of_price = 1

    def tasks(self, num_kills: int, *, webhook: str) -> list[asyncio.Task[None]]:
        roles = ("router", "decode", "kvstore")
        acts: list[tuple[Callable[[], Awaitable[None]], int]] = [
            *((lambda role=role: self.kill(role), num_kills) for role in roles),  # type: ignore[misc]
            (self.kill_redis, num_kills),
            (lambda: self.push_and_kill(webhook), num_kills),
            (self.reload, num_kills),
            (self.set_clock, num_kills),
            (self.change_price, 3),
        ]
        return [asyncio.create_task(self._spread(act, number)) for act, number in acts]

    async def _spread(self, act: Callable[[], Awaitable[None]], number: int) -> None:
        for index in range(number):
            at = (index + self.chance.uniform(0.2, 0.8)) / number
            while self.progress() < at:  # noqa: ASYNC110 - of a count and of a clock
                await asyncio.sleep(0.2)
            await act()

    async def kill(self, role: str) -> None:
        alive = [process for process in self.deployment.processes if process.role == role and process.serves]
        victim = self.chance.choice(alive)
        await self.deployment.kill(victim)
        self.counts[f"{role} kills"] += 1
        await asyncio.sleep(self.chance.uniform(0, 1))
        await self.restart(victim)

    async def restart(self, victim: RoleProcess) -> None:
        while True:
            try:
                await self.deployment.restart(victim)
                return
            except AntefixError as err:
                # Another process uses the role's port, or the machine is too busy.
                self.counts[f"{victim.role} starts that failed"] += 1
                sys.stderr.write(f"{victim.role}: {err}\n")
                await asyncio.sleep(1)

    async def kill_redis(self) -> None:
        self.redis.kill()
        self.counts["redis kills"] += 1
        await asyncio.sleep(self.chance.random())
        await asyncio.to_thread(self.redis.start)

    async def push_and_kill(self, webhook: str) -> None:
        """Push the events so far. The pusher is killed while it pushes, and sometimes also loses its state file."""
        state, config = self.directory / "push", self.directory / "push.toml"
        key = self.directory / "push.key"
        key.touch(mode=0o600)
        key.write_text("secret")
        config.write_text(
            f'[[sink]]\nkind = "webhook"\nname = "hook"\nurl = "{webhook}"\nkey_file = "{key}"\nunmapped = "name"\n'
        )
        ledgers = [str(path) for path in sorted(self.deployment.config.data_dir.glob("ledger*"))]
        command = ["usage", "push", "--ledger", *ledgers, "--config", str(config), "--state", str(state), "--once"]
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "antefix_console", *command, stdout=asyncio.subprocess.DEVNULL
        )
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.chance.uniform(1.5, 8)):
                await process.wait()
        if process.returncode is None:
            process.kill()
            await process.wait()
            self.counts["pusher kills"] += 1
        elif process.returncode:
            self.counts["pushers that failed"] += 1
        if self.progress() < 0.3 and self.chance.random() < 0.5:
            shutil.rmtree(state, ignore_errors=True)
            self.counts["pusher states lost"] += 1

    async def reload(self) -> None:
        """Give all routers a file with other limits; sometimes a file that they must refuse."""
        path = self.directory / "tenants.toml"
        if self.chance.random() < 0.3:
            path.write_text('keys = "none"\n[[tenant]]\nname = 7\n')
            self.counts["faulty files"] += 1
            self.deployment.reload()
            await asyncio.sleep(1)
        write_tenants(path, tokens=10**12 + self.chance.randrange(10**9))
        self.deployment.reload()
        self.counts["reloads"] += 1

    async def set_clock(self) -> None:
        async with self._clock_stands:
            self._set(self.clock_s + self.chance.choice(STEPS_S))
            self.counts["clock steps"] += 1

    def _set(self, clock_s: int) -> None:
        self.clock_s, self.latest_clock_s = clock_s, max(clock_s, self.latest_clock_s)
        write_clock(self.directory, clock_s)

    async def change_price(self) -> None:
        """Change all models' prices from a time that is slightly later than every request priced so far."""
        async with self._clock_stands:
            self._set(self.latest_clock_s)
            self.number_of_price += 1
            now = datetime.fromtimestamp(time.time() + PRICE_AHEAD_S, UTC).replace(microsecond=0)
            add_card(self.directory / "cards.toml", self.number_of_price, now + timedelta(seconds=1))
            self.counts["price changes"] += 1
            await asyncio.sleep(PRICE_AHEAD_S + 3)


def write_clock(directory: Path, clock_s: int) -> None:
    """Write the shift. An existing file is written in place, because processes map it. Processes that read such a file
    never see half a value.
    """
    path = directory / "clock"
    with path.open("r+b" if path.exists() else "wb") as file:
        file.write(struct.pack("<q", clock_s * 1_000_000))


def clock_environment(directory: Path) -> dict[str, str]:
    """Environment variables for processes whose clock a file shifts (`clock_that_steps/sitecustomize.py`)."""
    paths = os.pathsep.join((str(CLOCK), *filter(None, (os.environ.get("PYTHONPATH"),))))
    return {"PYTHONPATH": paths, "ANTEFIX_CLOCK_FILE": str(directory / "clock")}


def write_tenants(path: Path, *, tokens: int) -> None:
    rows = [f'[[tenant]]\nname = "t{n}"\nlimit = [{{ window = "month", tokens = {tokens} }}]\n' for n in range(5)]
    part = path.with_suffix(".part")
    part.write_text('keys = "none"\n' + "".join(rows))
    part.rename(path)


def add_card(path: Path, number: int, effective: datetime) -> None:
    before = path.read_text() if path.exists() else ""
    part = path.with_suffix(".part")
    part.write_text(before + CARD.format(number=number, effective=effective.strftime("%Y-%m-%dT%H:%M:%SZ")))
    part.rename(path)
