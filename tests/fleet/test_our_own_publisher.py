"""Our own fleet router follows our workers' KV events, unencrypted and encrypted."""

import asyncio

import numpy as np
import pytest
import zmq.asyncio

from antefix.events.kv_publisher import KvPublisher, KvPublisherConfig
from antefix.events.kv_sockets import CurveKey, check_public_key, guard_client
from antefix.events.kv_subscriber import KvSubscriber
from antefix.secret import Keyring
from antefix_router.fleet.engine_index import EngineIndex
from antefix_router.fleet.fleet_names import FleetNames, scope_of
from antefix_router.placement.directory import Directory
from tests.waiting import until

SIZE = 4
TOKENS = np.arange(40, dtype=np.uint32)


@pytest.mark.parametrize("is_encrypted", [False, True])
async def test_our_workers_are_followed_too(tmp_path, is_encrypted):
    router_key, worker_key = CurveKey.from_file(tmp_path / "router"), CurveKey.from_file(tmp_path / "worker")
    secrets = {"key_file": str(tmp_path / "worker"), "clients": (router_key.public.decode(),)} if is_encrypted else {}
    publisher = KvPublisher(
        KvPublisherConfig(endpoint="tcp://127.0.0.1:0", replay="tcp://127.0.0.1:0", block_size=SIZE, **secrets)
    )
    publisher.start()
    directory, names, context = Directory(), FleetNames(Keyring(b"0123456789abcdef")), zmq.asyncio.Context()
    options = {}
    if is_encrypted:
        server = check_public_key(worker_key.public.decode())
        options["guard"] = lambda socket: guard_client(socket, router_key, server)
    subscriber = KvSubscriber(
        publisher.endpoint,
        EngineIndex("ours", directory, names),
        context,
        replay=publisher.replay_endpoint,
        quiet_s=0.2,
        **options,
    )

    def leading(salt=""):
        return int(directory.leading(["ours"], names.prompt(TOKENS, scope_of(salt=salt), SIZE).keys)[0])

    def tell(salt, blocks, parent=None):
        for block in blocks:
            name = f"{salt}{block}".encode().ljust(32)
            publisher.stored(name, parent=parent, tokens=TOKENS[block * SIZE : (block + 1) * SIZE], salt=salt)
            parent = name
        return parent

    last = tell("", range(3))
    following = asyncio.create_task(subscriber.run())
    try:
        # Events from before the router's start are replayed.
        await until(lambda: leading() == 3)
        tell("", range(3, 5), last)
        tell("whose", range(2))
        await until(lambda: leading() == 5 and leading("whose") == 2)
        publisher.evicted(b"4".ljust(32))
        await until(lambda: leading() == 4)
        assert subscriber.counters.num_gaps == subscriber.counters.num_unread == 0
    finally:
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
        context.destroy(linger=0)
        await publisher.close()
