"""How soon do requests hit again when a store restarts or joins? Two store services under load, and a third joins.

    python -m benchmarks.store_returns --json benchmarks/results/store_returns.json

back    store b is killed, is away for `--away` seconds while requests continue, and is started again on its directory
joins   store c, which has prompts of its own and was unknown until now, announces itself in Redis

`--readers` readers continuously look up and restore whole prompts of one store. Times start at the moment when the
service reports that it serves. seconds_to_90: the time after which at least 90% of the restores that
began in each quarter of a second were hits; the limit is 1 s. A hit must return the whole prompt with the right bytes.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import math
import random
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any, Final

from antefix.block import chain_of
from antefix.events.event_seal import EventKeys
from antefix.record import Record, RecordKind
from antefix.secret import Keyring, create_secret_file
from antefix.security import grants, own_credentials
from antefix.security.credentials import Credentials
from antefix.security.identity import Role
from antefix.store.many_stores import ManyStores
from antefix.store.open_store import StoreAddress, StoresConfig, open_stores, store_sources
from antefix.store.remote_store import RemoteStore
from antefix.store_files.seal import Seals
from antefix_console.deployment import Deployment, DeploymentConfig
from benchmarks.run_record import write
from tests.redis_servers import RedisServer

FINGERPRINT: Final = b"F" * 32
BLOCK_TOKENS: Final = 128
BLOCK_BYTES: Final = 64 << 10
WINDOW_S: Final = 0.25
LIMIT_S: Final = 1.0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Settings(StoresConfig):
    redis_password_file: str = ""
    redis_ca_file: str = ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--away", type=float, default=20.0, help="number of seconds for which the store is stopped (default: 20)"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--readers", type=int, default=8, help="requests at once (default: 8)")
    parser.add_argument(
        "--prompts", type=int, default=64, help="number of prompts in each store, of 32 blocks each (default: 64)"
    )
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        figures = asyncio.run(_measure(args, Path(directory)))
    for name, value in figures.items():
        sys.stdout.write(f"{name:<24} {value}\n")
    if args.json:
        settings = {"away_s": args.away, "readers": args.readers, "limit_s": LIMIT_S}
        write(args.json, {**settings, "figures": figures}, "grpcio")
    return 0


@dataclasses.dataclass(slots=True)
class _Load:
    """Repeated restores of one store's prompts. began: when each restore began, and whether it was complete."""

    stores: ManyStores
    chains: Sequence[Sequence[bytes]]
    owner: bytes
    began: list[tuple[float, bool]] = dataclasses.field(default_factory=list)
    longest_s: float = 0.0
    num_wrong: int = 0

    async def read(self, seed: int) -> None:
        rng, size = random.Random(seed), len(self.chains[0])
        into = [memoryview(bytearray(BLOCK_BYTES)) for _ in range(size)]
        while True:
            chain, started = rng.choice(self.chains), time.monotonic()
            found = await self.stores.lookup(chain, fingerprint=FINGERPRINT, tenant=self.owner)
            num_good = 0
            if found.num_blocks:
                num_good = await self.stores.get_blocks(
                    chain[: found.num_blocks], into[: found.num_blocks], fingerprint=FINGERPRINT, tenant=self.owner
                )
                wrong = [view[:32] != name for view, name in zip(into[:num_good], chain, strict=False)]
                self.num_wrong += sum(wrong)
            self.began.append((started, num_good == size))
            self.longest_s = max(self.longest_s, time.monotonic() - started)
            # A real request has other work to do between look-ups.
            await asyncio.sleep(rng.uniform(0.005, 0.02))

    @property
    def num_hits(self) -> int:
        return sum(hit for _, hit in self.began)

    def seconds_to_90(self, since: float) -> float:
        """Seconds from `since` until the share of hits is at least 0.9 in every later window."""
        shares = self.shares(since)
        bad = [number for number, share in enumerate(shares) if not math.isnan(share) and share < 0.9]
        return (bad[-1] + 1) * WINDOW_S if bad else 0.0

    def shares(self, since: float) -> list[float]:
        """The share of hits among the restores that began in each window. NaN: no restore began in the time window."""
        ends = max((at for at, _ in self.began), default=since)
        windows: list[list[bool]] = [[] for _ in range(max(1, math.ceil((ends - since) / WINDOW_S)))]
        for at, hit in self.began:
            if at >= since:
                windows[min(int((at - since) / WINDOW_S), len(windows) - 1)].append(hit)
        return [sum(each) / len(each) if each else math.nan for each in windows]


@contextlib.asynccontextmanager
async def _under_load(load: _Load, num_readers: int) -> AsyncIterator[None]:
    tasks = [asyncio.create_task(load.read(number)) for number in range(num_readers)]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        done = await asyncio.gather(*tasks, return_exceptions=True)
        errors = [each for each in done if isinstance(each, Exception)]
        if errors:
            raise errors[0]


class _Rack:
    """Store services that can be killed and started again at their address."""

    def __init__(self, directory: Path, redis_url: str) -> None:
        self.deployment = Deployment(DeploymentConfig(model=directory, data_dir=directory))
        (directory / "logs").mkdir()
        self.keyring = Keyring.from_file(create_secret_file(directory / "secret"))
        self.seals = Seals(self.keyring)
        self.owner = self.keyring.owner("bench")
        self._directory, self._redis_url = directory, redis_url
        self._processes: dict[str, Any] = {}

    async def start(self, name: str, *, leased: bool = False) -> str:
        where = self._directory / name
        flags = ["--dir", str(where), "--secret-file", str(self._directory / "secret"), "--budget-bytes", "1G"]
        flags += ["--address", f"unix:{where}.sock", "--scrub-bytes-per-s", "0"]
        if leased:
            flags += ["--lease-redis", self._redis_url, "--name", name, "--address", "127.0.0.1:0"]
        self._processes[name] = await self.deployment.start_role("kvstore", flags)
        return str(self._processes[name].address)

    async def kill(self, name: str) -> None:
        await self.deployment.kill(self._processes.pop(name))

    async def fill(self, address: str, chains: Sequence[Sequence[bytes]]) -> None:
        async with RemoteStore(address) as store:
            for chain in chains:
                result = await store.put([self._record(chain, number) for number in range(len(chain))])
                assert not result.refused, result

    def _record(self, chain: Sequence[bytes], number: int) -> Record:
        name = chain[number]
        record = Record(
            kind=RecordKind.BLOCK,
            hash=name,
            parent=chain[number - 1] if number else bytes(32),
            fingerprint=FINGERPRINT,
            position=(number + 1) * BLOCK_TOKENS,
            payload=name * (BLOCK_BYTES // 32),
            tenant=self.owner,
        )
        return self.seals.seal(record)


async def _measure(args: argparse.Namespace, directory: Path) -> dict[str, Any]:
    redis = RedisServer(directory).start()
    rack = _Rack(directory, redis.url)
    credentials = Credentials(Role.OPERATOR, files=None, keyring=rack.keyring)
    own_credentials.use(credentials)
    grants.hold(credentials.grant_for_owners([rack.owner], ttl_s=3600))
    try:
        addresses = {name: await rack.start(name) for name in "ab"}
        back = [await _back(args, rack, addresses, number) for number in range(args.rounds)]
        joins = [await _joins(args, rack, addresses, number) for number in range(args.rounds)]
        return _figures("back", back) | _figures("joins", joins)
    finally:
        await rack.deployment.stop()
        own_credentials.use(None)
        redis.kill()


def _figures(name: str, rounds: Sequence[tuple[_Load, float]]) -> dict[str, Any]:
    seconds = [load.seconds_to_90(since) for load, since in rounds]
    return {
        f"{name}_seconds_to_90": seconds,
        f"{name}_worst_s": max(seconds),
        f"{name}_hits_by_window": [
            None if math.isnan(share) else round(share, 2) for share in rounds[-1][0].shares(rounds[-1][1])[:12]
        ],
        f"{name}_restores": [len(load.began) for load, _ in rounds],
        f"{name}_longest_restore_s": round(max(load.longest_s for load, _ in rounds), 2),
        f"{name}_wrong_blocks": sum(load.num_wrong for load, _ in rounds),
    }


def _chains(args: argparse.Namespace, seed: int) -> list[list[bytes]]:
    rng = random.Random(seed)
    prompts = [[rng.randrange(1 << 16) for _ in range(32 * BLOCK_TOKENS)] for _ in range(args.prompts)]
    return [
        list(chain_of(each, fingerprint_digest=FINGERPRINT, key=b"k" * 32, block_size=BLOCK_TOKENS).hashes)
        for each in prompts
    ]


async def _back(args: argparse.Namespace, rack: _Rack, addresses: dict[str, str], number: int) -> tuple[_Load, float]:
    chains = _chains(args, number)
    await rack.fill(addresses["b"], chains)
    where = [StoreAddress(name=name, address=address) for name, address in addresses.items()]
    stores = open_stores(where, near=["a"], seals=rack.seals)
    assert isinstance(stores, ManyStores)
    load = _Load(stores, chains, rack.owner)
    async with _under_load(load, args.readers):
        await asyncio.sleep(2.0)
        assert load.num_hits > 0.9 * len(load.began), "no hits before"
        await rack.kill("b")
        await asyncio.sleep(args.away)
        await rack.start("b")
        since = time.monotonic()
        await asyncio.sleep(5.0)
    await stores.close()
    return load, since


async def _joins(args: argparse.Namespace, rack: _Rack, addresses: dict[str, str], number: int) -> tuple[_Load, float]:
    name, chains = f"c{number}", _chains(args, 1000 + number)
    # The store already holds its prompts when it joins.
    await rack.fill(await rack.start(name), chains)
    await rack.kill(name)
    sources = store_sources(Settings(stores=(rack._redis_url,)), EventKeys.of(rack.keyring))
    where = [StoreAddress(name=each, address=address) for each, address in addresses.items()]
    stores = open_stores(where, near=["a"], seals=rack.seals, sources=sources)
    assert isinstance(stores, ManyStores)
    await stores.start()
    load = _Load(stores, chains, rack.owner)
    async with _under_load(load, args.readers):
        await asyncio.sleep(2.0)
        await rack.start(name, leased=True)
        since = time.monotonic()
        await asyncio.sleep(5.0)
    await stores.close()
    await rack.kill(name)
    return load, since


if __name__ == "__main__":
    sys.exit(main())
