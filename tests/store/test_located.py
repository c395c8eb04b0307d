"""A router's message about where a prompt's blocks are: its parts, additions, wire format, and saved calls."""

import asyncio

import pytest

from antefix.errors import InvalidRequest, Unavailable
from antefix.located import Located, ReadSpeed, tell, told
from antefix.located_wire import hints_from_wire, hints_to_wire, speeds_from_wire, speeds_to_wire
from antefix.record import Held, RecordKind
from antefix.store.many_stores import ManyStores
from antefix.store.tier import Tier
from antefix.tier_kind import TierKind
from antefix.v1 import worker_pb2
from tests.kvstore.small_store import FINGERPRINT
from tests.store.many_embedded import OWNER, PROMPT, rack_of

CHAIN = [bytes([number]) * 32 for number in range(10)]


def located(**held):
    return Located(chain=CHAIN, fingerprint=b"f", held=held)


@pytest.fixture(autouse=True)
def _told_nothing():
    yield
    tell(None)


def test_a_part_of_the_chain_has_its_part_of_the_routers_report():
    word = located(a=Held(spans=((0, 4), (6, 9)), checkpoints=(2, 4, 9)))
    assert word.of("a", CHAIN, b"f") == word.held["a"]
    assert word.of("a", CHAIN[2:8], b"f") == Held(spans=((0, 2), (4, 6)), checkpoints=(2,))
    assert word.of("a", CHAIN[4:5], b"f") == Held()
    assert word.of("a", CHAIN[8:], b"f") == Held(spans=((0, 1),), checkpoints=(1,))


@pytest.mark.parametrize(
    ("store", "hashes", "fingerprint"),
    [
        ("b", CHAIN, b"f"),
        ("a", CHAIN, b"g"),
        ("a", [], b"f"),
        ("a", [b"x" * 32], b"f"),
        ("a", [CHAIN[0], CHAIN[2]], b"f"),
        ("a", [*CHAIN, b"x" * 32], b"f"),
    ],
)
def test_other_stores_chains_and_fingerprints_have_no_report(store, hashes, fingerprint):
    assert located(a=Held(spans=((0, 4),))).of(store, hashes, fingerprint) is None


@pytest.mark.parametrize(
    ("spans", "added", "expected"),
    [
        ((), (2, 5), ((2, 5),)),
        (((0, 2),), (2, 5), ((0, 5),)),
        (((0, 1), (3, 4), (7, 9)), (2, 5), ((0, 1), (2, 5), (7, 9))),
        (((0, 3), (4, 8)), (2, 5), ((0, 8),)),
    ],
)
def test_what_was_stored_since_is_added(spans, added, expected):
    word = located(a=Held(spans=spans)).with_span(["a", "b"], *added)
    assert word.held["a"].spans == expected and word.held["b"].spans == (added,)
    assert word.held["b"].checkpoints == (5,)


def test_runs_of_a_prefix_by_who_has_them():
    word = located(a=Held(spans=((0, 4),)), b=Held(spans=((2, 8),)))
    assert word.parts(7) == [(2, frozenset("a")), (2, frozenset("ab")), (3, frozenset("b"))]
    assert word.parts(0) == []


def test_the_wire_keeps_it():
    word = located(a=Held(spans=((0, 4), (6, 9)), checkpoints=(2, 4)), b=Held())
    again = hints_from_wire(hints_to_wire(word), CHAIN, b"f")
    assert again.held == word.held
    assert hints_to_wire(None) == [] and hints_from_wire([], CHAIN, b"f") is None
    speeds = {"a": ReadSpeed(latency_s=0.01, seconds_per_token=1e-6)}
    assert speeds_from_wire(speeds_to_wire(speeds)) == speeds
    assert speeds_from_wire([worker_pb2.TierSpeed(tier="a", latency_s=float("nan"))]) == {}
    assert speeds_from_wire([worker_pb2.TierSpeed(tier="a", seconds_per_token=-1)]) == {}


@pytest.mark.parametrize("hint", [{"spans": [0]}, {"spans": [3, 2]}, {"spans": [0, 2, 2, 3]}, {"checkpoints": [2, 2]}])
def test_invalid_spans_are_refused(hint):
    with pytest.raises(InvalidRequest, match="store 'a'"):
        hints_from_wire([worker_pb2.StoreHint(store="a", **hint)], CHAIN, b"f")


async def test_stores_that_the_router_spoke_for_are_not_asked(tmp_path):
    async with rack_of(tmp_path) as rack:
        await rack.fill("b", 0, 30)
        await rack.fill("c", 30, 40, checkpoints=[39])
        word = await rack.many.locate(PROMPT.hashes, fingerprint=FINGERPRINT, tenant=OWNER)
        for store in rack.stores.values():
            store.num_asked = 0
        tell(Located(chain=PROMPT.hashes, fingerprint=FINGERPRINT, held=word.held))
        assert await rack.num_restored() == 40
        kind = RecordKind.CHECKPOINT
        assert await rack.many.get(kind, PROMPT.hashes[39], fingerprint=FINGERPRINT, tenant=OWNER)
        # Only the near store is asked, which costs no call.
        assert {name: store.num_asked for name, store in rack.stores.items()} == {"a": 1, "b": 0, "c": 0}


async def test_a_stale_report_costs_a_shorter_prefix_and_no_wrong_byte(tmp_path):
    async with rack_of(tmp_path) as rack:
        await rack.fill("b", 0, 20)
        tell(Located(chain=PROMPT.hashes, fingerprint=FINGERPRINT, held={"b": Held(spans=((0, 40),)), "c": Held()}))
        assert await rack.num_restored() == 20
        # Blocks that arrived since and that the router did not name are found by the next request that asks the stores.
        await rack.fill("c", 20, 40)
        assert await rack.num_restored() == 20
        tell(None)
        assert await rack.num_restored() == 40


async def test_an_older_report_hides_nothing_of_a_tier_whose_index_is_here(tmp_path):
    async with rack_of(tmp_path) as rack:
        await rack.fill("c", 0, 40)
        objects = Tier("file", TierKind.OBJECT, rack.stores["c"])
        many = ManyStores(rack.members[:1], more=[objects])
        tell(Located(chain=PROMPT.hashes, fingerprint=FINGERPRINT, held={objects.name: Held()}))
        found = await many.lookup(PROMPT.hashes, fingerprint=FINGERPRINT, tenant=OWNER)
        assert found.num_blocks == 40


async def test_a_store_that_was_not_spoken_for_is_asked(tmp_path):
    async with rack_of(tmp_path) as rack:
        await rack.fill("b", 0, 20)
        await rack.fill("c", 20, 40)
        tell(Located(chain=PROMPT.hashes, fingerprint=FINGERPRINT, held={"b": Held(spans=((0, 20),))}))
        assert await rack.num_restored() == 40


async def test_tasks_inherit_the_routers_report():
    tell(located(a=Held()))
    assert await asyncio.create_task(_told()) is told() is not None


async def _told():
    return told()


async def test_stores_come_and_go_while_others_are_read(tmp_path):
    async with rack_of(tmp_path) as rack:
        await rack.fill("a", 0, 10)
        await rack.fill("b", 10, 20)
        await rack.fill("c", 20, 30)
        first, second, third = rack.members
        rack.many = ManyStores([first])
        assert await rack.num_restored() == 10
        rack.many.change([first, second, third])
        rack.stores["b"].slow_s = 0.2
        reading = asyncio.create_task(rack.num_restored())
        await asyncio.sleep(0.1)
        rack.many.change([first, third])
        # A read uses the stores with which it began until its end.
        assert await reading == 30
        assert await rack.num_restored() == 10


async def test_where_no_store_is_known_nothing_is_there_and_nothing_is_taken():
    none = ManyStores([])
    for call in (
        none.lookup(PROMPT.hashes, fingerprint=FINGERPRINT),
        none.put([PROMPT.block(0)]),
        none.stats(),
        none.fate(PROMPT.hashes[0], fingerprint=FINGERPRINT),
    ):
        with pytest.raises(Unavailable):
            await call
    assert none.num_broken_seals == 0
    await none.close()
