"""Store services that register in Redis are found by every process that looks, in any order of starts and moves."""

import asyncio
import dataclasses
import os
import signal
import sys

import pytest

from antefix.events.event_seal import EventKeys
from antefix.secret import Keyring, create_secret_file
from antefix.security import grants, own_credentials
from antefix.security.credentials import Credentials
from antefix.security.identity import Role
from antefix.store.open_store import StoresConfig, open_stores, store_sources
from tests.kvstore.small_store import FINGERPRINT, Prompt, owner
from tests.waiting import until

pytestmark = pytest.mark.services
PROMPT = Prompt(list(range(64)))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Settings(StoresConfig):
    redis_password_file: str = ""
    redis_ca_file: str = ""


@pytest.fixture
async def serve(tmp_path, redis):
    """`serve(name)`: starts a store process with that name, which registers itself in Redis."""
    started = []

    async def serve(name):
        flags = {
            "dir": str(tmp_path / name),
            "name": name,
            "lease-redis": redis.url,
            "secret-file": str(tmp_path / "secret"),
            "address": "127.0.0.1:0",
            "budget-bytes": "16M",
        }
        parts = [part for flag, value in flags.items() for part in (f"--{flag}", value)]
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "antefix_console", "serve", "kvstore", *parts, env={**os.environ},
            stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL,
        )  # fmt: skip
        started.append(process)
        return process

    yield serve
    for process in started:
        if process.returncode is None:
            process.kill()
        await process.wait()


@pytest.fixture
async def stores(tmp_path, redis):
    keyring = Keyring.from_file(create_secret_file(tmp_path / "secret"))
    credentials = Credentials(Role.OPERATOR, files=None, keyring=keyring)
    own_credentials.use(credentials)
    grants.hold(credentials.grant_for_owners([owner("")], ttl_s=300))
    sources = store_sources(Settings(stores=(redis.url,)), EventKeys.of(keyring))
    opened = open_stores([], sources=sources)
    await opened.start()
    yield opened
    await opened.close()
    own_credentials.use(None)
    grants.hold(b"")


def found(stores):
    return {member.tier.name: member.address for member in stores.members.stores}


async def test_stores_that_start_later_die_and_move_are_found_and_used(stores, serve):
    # 1. There is no store yet, and that causes no failure.
    assert found(stores) == {}
    first = await serve("a")
    await until(lambda: "a" in found(stores))
    assert (await stores.put([PROMPT.block(number) for number in range(2)])).num_stored == 2
    # 2. Another store registers.
    second = await serve("b")
    await until(lambda: set(found(stores)) == {"a", "b"})
    # 3. The first store dies without leaving and comes back at another address with its records.
    before = found(stores)["a"]
    first.send_signal(signal.SIGKILL)
    await first.wait()
    await serve("a")
    await until(lambda: found(stores).get("a", before) != before)

    async def are_found():
        return (await stores.lookup(PROMPT.hashes, fingerprint=FINGERPRINT)).num_blocks == 2

    # The connection to the new address may not be open yet.
    await until(are_found)
    # 4. A store that stops removes its registration.
    second.send_signal(signal.SIGTERM)
    await until(lambda: set(found(stores)) == {"a"})
