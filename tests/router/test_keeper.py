"""Cache breakpoints are pinned in the store while requests run; a router has one connection to its store."""

from pathlib import Path

from antefix import rpc
from antefix.block import chain_of
from antefix.model_dir import identify
from antefix.record import OWNER_BYTES, RecordKind
from antefix.secret import create_secret_file
from antefix.store.remote_store import RemoteStore
from antefix.tokenizer import load_tokenizer
from antefix_router.assembly import Router
from antefix_router.breakpoint_pins import BreakpointPins
from antefix_router.router_config import RouterConfig
from tests.router.test_feed_of_a_store import serve
from tests.waiting import until

MODEL = Path(__file__).parents[2] / "models" / "antefix-tiny"
OWNER = b"o" * OWNER_BYTES
CHAIN = chain_of(list(range(40)), fingerprint_digest=b"f" * 32, key=b"k" * 32, block_size=8)


async def test_the_last_whole_block_before_a_breakpoint_is_pinned_with_its_checkpoint(store):
    pins = BreakpointPins(store, lambda: b"f" * 32)
    pins.pin(CHAIN, [(7, 60.0), (21, 300.0)], owner=OWNER)
    await pins.close()
    names = [(kind, CHAIN.hashes[1]) for kind in (RecordKind.BLOCK, RecordKind.CHECKPOINT)]
    assert store.pins == [(names, 300.0, OWNER)]


async def test_a_pin_that_fails_costs_nothing_else(store):
    store.broken.add("pin")
    pins = BreakpointPins(store, lambda: b"f" * 32)
    pins.pin(CHAIN, [(16, 60.0)], owner=OWNER)
    await pins.close()
    assert not store.pins


async def test_lookups_pins_and_events_share_one_connection(tmp_path, monkeypatch):
    servicer, server = await serve(tmp_path / "store")
    channels = []
    channel = rpc.channel
    monkeypatch.setattr(rpc, "channel", lambda address, **to: channels.append(address) or channel(address, **to))
    config = RouterConfig(
        model=str(MODEL),
        secret_file=str(create_secret_file(tmp_path / "secret")),
        store_address=server.address,
        store_events=True,
        decode=("127.0.0.1:9",),
        ledger_dir=str(tmp_path / "ledger"),
    )
    store = RemoteStore(server.address)
    router = Router(identify(MODEL), load_tokenizer(MODEL), store, config)
    try:
        router.feed.start()
        await until(lambda: router.feed.in_step)
        router.pins.pin(CHAIN, [(16, 60.0)], owner=OWNER)
        await store.lookup(CHAIN.hashes, fingerprint=b"f" * 32)
        await router.pins.close()
        assert channels.count(server.address) == 1
    finally:
        await router.feed.close()
        await router.front.accounts.close()
        await store.close()
        await server.drain(0)
        await servicer.close()
