"""Several stores as one: the blocks of any store are found, every loss is a miss, and no wrong byte is returned."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest

from antefix.errors import DeadlineExceeded, Unavailable
from antefix.record import Held, RecordKind
from antefix.store import read_shares, read_tiers, standing
from antefix.store.local_copies import LocalCopies
from antefix.store.store_feed import StoreFeed
from antefix.store.store_stats import sum_of
from antefix_kvstore.check_store import fsck
from tests.kvstore.small_store import BLOCK, FINGERPRINT, Clock, Prompt
from tests.store.many_embedded import OWNER, PROMPT, Rack, rack_of
from tests.waiting import until

pytestmark = pytest.mark.asyncio


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make pieces small, so that forty blocks are many pieces."""
    monkeypatch.setattr(read_shares, "PIECE_BYTES", 4 * PROMPT.payload_bytes)


async def test_a_prefix_is_what_all_of_them_hold_together(tmp_path: Path) -> None:
    async with rack_of(tmp_path) as rack:
        await rack.fill("a", 10, 20)
        await rack.fill("b", 0, 12, checkpoints=[9])
        await rack.fill("c", 20, 35, checkpoints=[30])
        found = await rack.many.lookup(PROMPT.hashes, fingerprint=FINGERPRINT)
        assert found.num_blocks == 35
        assert found.tiers == ((10, "peer:b"), (20, "disk:a"), (35, "peer:c"))
        assert dict(zip(found.checkpoints, found.checkpoint_tiers, strict=True)) == {10: "peer:b", 31: "peer:c"}
        assert await rack.num_restored() == 35


async def test_a_restore_says_what_each_tier_gave(tmp_path: Path) -> None:
    async with rack_of(tmp_path) as rack:
        await rack.fill("a", 0, 8)
        await rack.fill("b", 8, 20)
        read = await rack.many.read_blocks(PROMPT.hashes, PROMPT.buffers(), fingerprint=FINGERPRINT)
        assert {each.tier: each.num_blocks for each in read.reads} == {"disk:a": 8, "peer:b": 12}
        assert sum(each.nbytes for each in read.reads) == 20 * PROMPT.payload_bytes
        assert all(each.seconds > 0 for each in read.reads)


async def test_the_nearest_store_is_read_where_several_have_a_block(tmp_path: Path) -> None:
    async with rack_of(tmp_path) as rack:
        await rack.fill("a", 0, 4)
        await rack.fill("b", 0, 4)
        assert await rack.num_restored() == 4
        assert (rack.stores["a"].num_read, rack.stores["b"].num_read) == (4, 0)


@pytest.mark.parametrize("dies_after", [0, 1, 7, 15])
async def test_the_loss_of_a_store_in_mid_stream_is_read_elsewhere(tmp_path: Path, dies_after: int) -> None:
    async with rack_of(tmp_path) as rack:
        await rack.fill("b", 0, 40)
        await rack.fill("c", 0, 40)
        rack.stores["b"].dies_after = dies_after
        assert await rack.num_restored() == 40
        assert rack.stores["b"].dead


async def test_the_loss_of_the_only_holder_ends_the_prefix_there(tmp_path: Path) -> None:
    async with rack_of(tmp_path) as rack:
        await rack.fill("a", 0, 16)
        await rack.fill("b", 16, 40)
        rack.stores["b"].dies_after = 5
        assert 16 <= await rack.num_restored() <= 21
        # A store that is left alone for a moment also counts as holding nothing.
        assert await rack.num_stored() == 16


async def test_a_store_that_hangs_is_given_up_for_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_tiers, "_LATE_S", 0.05)
    monkeypatch.setattr(read_tiers, "_ALONE_S", 1.0)
    async with rack_of(tmp_path) as rack:
        await rack.fill("b", 0, 40)
        await rack.fill("c", 0, 40)
        rack.stores["b"].hangs = True
        assert await rack.num_restored() == 40
        assert rack.stores["b"].num_hung
        assert rack.members[1].tier.num_failures


async def test_a_store_that_was_only_late_is_asked_again_when_no_other_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read_tiers, "_LATE_S", 0.05)
    async with rack_of(tmp_path) as rack:
        await rack.fill("b", 0, 40)
        await rack.fill("c", 0, 40)
        # Each store is given up once in favour of the other.
        rack.stores["b"].slow_s = rack.stores["c"].slow_s = 0.3
        rack.stores["c"].dies_after = 0
        assert await rack.num_restored() == 40


async def test_a_store_that_hangs_alone_costs_its_part_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read_tiers, "_ALONE_S", 0.3)
    async with rack_of(tmp_path) as rack:
        await rack.fill("a", 0, 12)
        await rack.fill("b", 12, 40)
        rack.stores["b"].hangs = True
        assert await rack.num_restored() == 12


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use a tenth of the real times, and never ask a store again."""
    monkeypatch.setattr(standing, "ASK_S", 0.05)
    monkeypatch.setattr(standing, "ASK_S_MAX", 60.0)
    monkeypatch.setattr(standing, "SHUNNED_S", 3600.0)
    monkeypatch.setattr(standing, "SHUNNED_S_MAX", 3600.0)


def wait_long_for(rack: Rack, *names: str) -> None:
    """Set long time limits, so that these stores are not late even if this machine is busy."""
    for name, member in zip(rack.stores, rack.members, strict=True):
        if name in names:
            member.tier.standing.answered(60.0)


@pytest.mark.usefixtures("quick")
async def test_a_late_answer_is_a_miss_for_the_one_who_asked_and_a_hit_for_the_next(tmp_path: Path) -> None:
    async with rack_of(tmp_path) as rack:
        await rack.fill("a", 0, 12)
        await rack.fill("b", 12, 40)
        wait_long_for(rack, "a", "c")
        rack.stores["b"].says_s = 0.1
        assert await rack.num_stored() == 12
        tier = rack.members[1].tier
        assert not tier.is_shunned
        # The answer came late, and its time sets how long the next answer may take.
        await until(lambda: tier.standing.limit_s > 0.1)
        wait_long_for(rack, "b")
        assert await rack.num_stored() == 40


@pytest.mark.usefixtures("quick")
async def test_a_store_that_never_says_what_it_holds_is_left_alone_after_some_questions(tmp_path: Path) -> None:
    async with rack_of(tmp_path) as rack:
        await rack.fill("a", 0, 12)
        wait_long_for(rack, "a", "c")
        rack.stores["b"].says_s = 3600.0
        for _ in range(10):
            assert await rack.num_stored() == 12
        assert rack.stores["b"].num_asked == standing.NUM_LATE_MAX
        assert rack.members[1].tier.is_shunned


@pytest.mark.usefixtures("quick")
async def test_a_question_that_runs_out_of_its_time_is_late_once(tmp_path: Path) -> None:
    """The client's own limit is shorter than a slow store's time. The store counts as late, not as down."""
    async with rack_of(tmp_path) as rack:
        await rack.fill("a", 0, 12)
        wait_long_for(rack, "a", "b", "c")
        store = rack.stores["b"]

        async def held(*args: object, **kwargs: object) -> Held:
            raise DeadlineExceeded("over its time")

        store.held = held  # type: ignore[method-assign]
        tier = rack.members[1].tier
        for number in range(1, standing.NUM_LATE_MAX + 1):
            assert not tier.is_shunned
            assert await rack.num_stored() == 12
            assert tier.standing.num_late == number
        assert tier.is_shunned


@pytest.mark.usefixtures("quick")
async def test_questions_that_are_late_together_are_one_reason_to_leave_a_store_alone(tmp_path: Path) -> None:
    async with rack_of(tmp_path) as rack:
        await rack.fill("a", 0, 12)
        wait_long_for(rack, "a", "c")
        rack.stores["b"].says_s = 0.15
        assert set(await asyncio.gather(*(rack.num_stored() for _ in range(40)))) == {12}
        assert not rack.members[1].tier.is_shunned


async def test_a_stale_report_is_a_miss(tmp_path: Path) -> None:
    async with rack_of(tmp_path) as rack:
        await rack.fill("a", 0, 12)
        await rack.fill("b", 12, 40)
        await rack.fill("c", 20, 30)
        rack.stores["b"].lost = {PROMPT.hashes[22], PROMPT.hashes[33]}
        # Another store has the first of the two lost blocks, and no store has the second.
        assert await rack.num_restored() == 33


async def test_only_when_no_store_answers_is_that_an_error(tmp_path: Path) -> None:
    async with rack_of(tmp_path) as rack:
        await rack.fill("a", 0, 12)
        rack.stores["b"].dead = rack.stores["c"].dead = True
        assert await rack.num_stored() == 12
        rack.stores["a"].dead = True
        with pytest.raises(Unavailable):
            await rack.many.lookup(PROMPT.hashes, fingerprint=FINGERPRINT)


async def test_what_is_computed_after_anothers_prefix_goes_to_this_hosts_store(tmp_path: Path) -> None:
    async with rack_of(tmp_path) as rack:
        await rack.fill("b", 0, 12)
        result = await rack.many.put([PROMPT.block(index) for index in range(12, 20)] + [PROMPT.checkpoint(19)])
        assert (result.num_stored, result.refused) == (9, {})
        assert rack.held_here("a") == ((12, 20),)
        assert await rack.num_restored() == 20


async def test_writes_go_to_another_store_while_this_hosts_is_down(tmp_path: Path) -> None:
    async with rack_of(tmp_path) as rack:
        rack.stores["a"].dead = True
        assert (await rack.many.put(PROMPT.blocks(6))).num_stored == 6
        assert await rack.num_restored() == 6
        rack.stores["b"].dead = rack.stores["c"].dead = True
        with pytest.raises(Unavailable):
            await rack.many.put(PROMPT.blocks(6))


async def test_several_disks_of_a_host_share_its_records(tmp_path: Path) -> None:
    async with rack_of(tmp_path, num_near=2) as rack:
        for start in range(0, 40, 4):
            await rack.many.put([PROMPT.block(index) for index in range(start, start + 4)])
        assert rack.held_here("a")
        assert rack.held_here("b")
        assert not rack.held_here("c")
        assert await rack.num_restored() == 40


async def test_a_leaving_store_takes_only_what_no_other_holds(tmp_path: Path) -> None:
    async with rack_of(tmp_path) as rack:
        await rack.fill("a", 0, 20)
        await rack.fill("b", 15, 30)
        await rack.fill("c", 10, 25)
        rack.stores["b"].dead = True
        assert await rack.num_stored() == 25
        assert await rack.num_restored() == 25


async def test_a_prefix_read_three_times_from_another_host_is_local_at_the_fourth(tmp_path: Path) -> None:
    copies = LocalCopies(bytes_max=1 << 20, ttl_s=60)
    async with rack_of(tmp_path, copies=copies) as rack:
        await rack.fill("b", 0, 30, checkpoints=[29])
        for number in range(3):
            assert await rack.num_restored() == 30
            assert await rack.many.get(RecordKind.CHECKPOINT, PROMPT.hashes[29], fingerprint=FINGERPRINT)
            await copies.settle()
            assert bool(rack.held_here("a")) == (number == 2)
        rack.stores["b"].dead = True
        assert await rack.num_restored() == 30
        payload = await rack.many.get(RecordKind.CHECKPOINT, PROMPT.hashes[29], fingerprint=FINGERPRINT)
        assert payload == PROMPT.payload(29, RecordKind.CHECKPOINT)
        assert copies.counters.num_copied == 31


async def test_copies_stay_within_their_budget_and_reads_within_their_time(tmp_path: Path) -> None:
    clock = Clock()
    copies = LocalCopies(bytes_max=8 * PROMPT.payload_bytes, ttl_s=60, clock=lambda: clock() / 1000)
    async with rack_of(tmp_path, copies=copies) as rack:
        await rack.fill("b", 0, 30)
        for _ in range(4):
            await rack.num_restored()
            await copies.settle()
            clock.advance(31)
        # Only two of the reads are within one minute.
        assert not rack.held_here("a")
        for _ in range(3):
            await rack.num_restored()
            await copies.settle()
        assert rack.held_here("a") == ((0, 8),)
        assert copies.counters.num_over_budget


async def test_without_a_budget_nothing_is_copied(tmp_path: Path) -> None:
    copies = LocalCopies(bytes_max=0, ttl_s=60)
    async with rack_of(tmp_path, copies=copies) as rack:
        await rack.fill("b", 0, 4)
        for _ in range(6):
            await rack.num_restored()
            await copies.settle()
        assert not rack.held_here("a")


async def test_a_pin_reaches_every_store_that_has_a_part(tmp_path: Path) -> None:
    async with rack_of(tmp_path) as rack:
        await rack.fill("a", 0, 10)
        await rack.fill("b", 10, 20, checkpoints=[19])
        chain = PROMPT.hashes[:20]
        assert await rack.many.pin_prefix(chain, fingerprint=FINGERPRINT, duration_s=60, owner=OWNER) == 20
        for name in ("a", "b"):
            while rack.stores[name].engine.space.evict(1):
                pass
        assert await rack.num_stored() == 20


async def test_an_eviction_reaches_all_of_them(tmp_path: Path) -> None:
    async with rack_of(tmp_path) as rack:
        await rack.fill("a", 0, 20)
        await rack.fill("b", 5, 20)
        assert await rack.many.evict([(RecordKind.BLOCK, PROMPT.hashes[5])], owner=OWNER) == 30
        assert await rack.num_stored() == 5


@pytest.mark.parametrize("seed", range(8))
async def test_whatever_is_lost_the_prefix_is_right(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With any holders, deaths, hangs and stale reports, the restored blocks are a right prefix of the stored ones."""
    monkeypatch.setattr(read_tiers, "_LATE_S", 0.5)
    monkeypatch.setattr(read_tiers, "_ALONE_S", 1.0)
    chance = random.Random(seed)
    async with rack_of(tmp_path, names="abcd") as rack:
        held: set[int] = set()
        safe: set[int] = set()
        for name, store in rack.stores.items():
            is_safe = chance.random() < 0.4
            for _ in range(chance.randrange(1, 4)):
                start = chance.choice([0, 0, chance.randrange(40)])
                stop = min(40, start + chance.randrange(1, 30))
                await rack.fill(name, start, stop)
                held |= set(range(start, stop))
                safe |= set(range(start, stop)) if is_safe else set()
            if not is_safe:
                store.dies_after = chance.choice([None, chance.randrange(12)])
                store.hangs = chance.random() < 0.2 and name != "d"
                store.lost = {PROMPT.hashes[chance.randrange(40)] for _ in range(chance.randrange(3))}
        num_restored = await rack.num_restored()
        assert _leading(safe) <= num_restored <= _leading(held)
    for name in "abcd":
        assert fsck(tmp_path / name).sound


def _leading(blocks: set[int]) -> int:
    return next(index for index in range(41) if index not in blocks)


def followed(rack, **options):
    """Feeds for all stores except this host's, in step with the stores' present contents."""

    def make(member, fingerprint):
        return StoreFeed(member.store.watch, fingerprint=fingerprint, **options)

    rack.many._make_feed = make
    rack.many.follow(FINGERPRINT)
    return [member.feed for member in rack.members[1:]]


async def test_what_others_hold_is_known_from_their_events_and_nobody_is_asked(tmp_path: Path) -> None:
    async with rack_of(tmp_path) as rack:
        await rack.fill("b", 0, 12, checkpoints=[9])
        feeds = followed(rack)
        await until(lambda: all(feed.in_step for feed in feeds))
        for name in "bc":
            rack.stores[name].num_asked = 0
        assert await rack.num_stored() == 12
        await rack.fill("c", 12, 20)
        await until(lambda: len(feeds[1]) == 8)
        found = await rack.many.lookup(PROMPT.hashes, fingerprint=FINGERPRINT)
        assert (found.num_blocks, found.checkpoints) == (20, (10,))
        assert found.tiers == ((12, "peer:b"), (20, "peer:c"))
        assert [rack.stores[name].num_asked for name in "bc"] == [0, 0]
        assert await rack.num_restored() == 20


async def test_events_that_come_late_cost_a_miss_and_never_a_wrong_block(tmp_path: Path) -> None:
    async with rack_of(tmp_path) as rack:
        await rack.fill("b", 0, 20)
        await rack.fill("c", 0, 6)
        feeds = followed(rack)
        await until(lambda: all(feed.in_step for feed in feeds))
        # From now on the directory gets no events, but still counts as in step.
        for feed in feeds:
            feed.apply = lambda batch: True  # type: ignore[method-assign]
        rack.stores["b"].engine.evict([(RecordKind.BLOCK, PROMPT.hashes[9])])
        rack.stores["b"].engine.evict([(RecordKind.BLOCK, PROMPT.hashes[3])])
        assert await rack.num_stored() == 20
        assert await rack.num_restored() == 6


async def test_another_fingerprint_is_asked_for(tmp_path: Path) -> None:
    other = Prompt(list(range(BLOCK * 4)), fingerprint=b"O" * 32)
    async with rack_of(tmp_path) as rack:
        await rack.stores["b"].store.put(other.blocks())
        feeds = followed(rack)
        await until(lambda: all(feed.in_step for feed in feeds))
        found = await rack.many.lookup(other.hashes, fingerprint=other.fingerprint)
        assert found.num_blocks == 4


async def test_the_stores_numbers_are_told_one_by_one_and_together(tmp_path: Path) -> None:
    async with rack_of(tmp_path) as rack:
        await rack.fill("a", 0, 4)
        await rack.fill("b", 2, 12, checkpoints=[9])
        by_store = await rack.many.stats_by_store()
        counts = {name: totals.kinds[RecordKind.BLOCK].num_records for name, totals in by_store.items()}
        assert counts == {"a": 4, "b": 10, "c": 0}
        together = sum_of(list(by_store.values()))
        assert together.kinds[RecordKind.BLOCK].num_records == 14
        assert together.kinds[RecordKind.CHECKPOINT].num_records == 1
        assert together.used_bytes == sum(totals.used_bytes for totals in by_store.values())
        rack.stores["b"].dead = True
        assert set(await rack.many.stats_by_store()) == {"a", "c"}
