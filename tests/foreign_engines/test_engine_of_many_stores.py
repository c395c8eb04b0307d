"""An engine over three store services writes to the near one, reads from all, and survives their loss."""

import asyncio
import contextlib

import pytest

from antefix import rpc
from antefix.errors import ConfigError
from antefix.secret import Keyring, create_secret_file
from antefix.security.identity import Role
from antefix.security.process_security import open_security
from antefix.v1 import kvstore_pb2
from antefix_engines.engine_store import EngineStore, StoreSettings
from antefix_kvstore.kvstore_config import KvStoreConfig
from antefix_kvstore.server import KvStoreServicer, register
from antefix_kvstore.storage_engine import StorageEngine
from tests.foreign_engines.test_engine_store import BLOCK, LAYOUT, fingerprint, records_of


@pytest.fixture
async def services(tmp_path):
    """`services[name]`: the service's address, and the function that stops it."""
    secret = create_secret_file(tmp_path / "secret")
    async with contextlib.AsyncExitStack() as stack:
        running = {}
        for name in "abc":
            config = KvStoreConfig(dir=str(tmp_path / name), budget_bytes=8 << 20, scrub_bytes_per_s=0, durable=False)
            servicer = KvStoreServicer(StorageEngine(config))
            server = await rpc.start_server(
                "127.0.0.1:0",
                lambda target, servicer=servicer: register(servicer, target),
                [kvstore_pb2.DESCRIPTOR],
                security=open_security(Role.KVSTORE, "", keyring=Keyring.from_file(secret)),
            )
            stack.push_async_callback(servicer.close)
            stack.push_async_callback(server.drain, 0)
            running[name] = server
        yield running


def settings(services, tmp_path, near):
    return StoreSettings(
        stores=", ".join(f"{name}={server.address}" for name, server in services.items()),
        near_stores=near,
        secret_file=str(tmp_path / "secret"),
    )


async def test_what_one_engine_wrote_to_its_store_another_reads_from_there(services, tmp_path):
    def use():
        with (
            EngineStore.open(settings(services, tmp_path, "b")) as writer,
            EngineStore.open(settings(services, tmp_path, ["c"])) as reader,
        ):
            chain, records = records_of(writer.kv(fingerprint(), LAYOUT), range(3 * BLOCK))
            assert writer.kv(fingerprint(), LAYOUT).put(records) == 6
            kv = reader.kv(fingerprint(), LAYOUT)
            found = kv.lookup(chain.hashes)
            assert (found.num_blocks, found.checkpoints) == (3, (1, 2, 3))
            assert {label for _, label in found.tiers} == {"peer:b"}
            rows = [memoryview(bytearray(LAYOUT.block_bytes)) for _ in range(3)]
            assert kv.get_blocks(chain.hashes, rows) == 3 and [row[0] for row in rows] == [0, 1, 2]
            assert not reader.counters.errors
            return chain, records

    await asyncio.to_thread(use)


async def test_a_store_that_is_gone_costs_an_engine_its_blocks_and_nothing_else(services, tmp_path):
    def write():
        with EngineStore.open(settings(services, tmp_path, "b")) as writer:
            kv = writer.kv(fingerprint(), LAYOUT)
            chain, records = records_of(kv, range(3 * BLOCK))
            assert kv.put(records) == 6
            return chain, records

    chain, records = await asyncio.to_thread(write)
    await services["b"].drain(0)

    def use():
        with EngineStore.open(settings(services, tmp_path, "b")) as engine:
            kv = engine.kv(fingerprint(), LAYOUT)
            assert kv.lookup(chain.hashes).num_blocks == 0
            # Another store takes the records that the near one cannot take.
            assert kv.put(records) == 6
            assert kv.lookup(chain.hashes).num_blocks == 3

    await asyncio.to_thread(use)


@pytest.mark.parametrize(
    ("given", "what"),
    [
        ({"stores": "a=h:1", "address": "h:1"}, "leave directory and address out"),
        ({"stores": "a=h:1,b=h:2"}, "secret_file"),
        ({"stores": "a=h:1,a=h:2", "secret_file": "s"}, "name of its own"),
        ({"stores": ["h:1"], "secret_file": "s"}, "NAME=ADDRESS"),
        ({"stores": "a=h:1", "near_stores": "b", "secret_file": "s"}, "b is not a name in"),
    ],
)
def test_settings_that_make_no_sense_are_refused_with_what_to_do(given, what):
    with pytest.raises(ConfigError, match=what):
        StoreSettings.from_mapping(given)
