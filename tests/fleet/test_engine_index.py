"""The index of one engine after its events: names, media, groups, and the blocks where a hit may end."""

import numpy as np
import pytest

from antefix.events.kv_events import KvBatch, KvCleared, KvRemoved, KvStored
from antefix.secret import Keyring
from antefix_router.fleet.engine_index import EngineIndex, GoneBlocks
from antefix_router.fleet.fleet_names import FleetNames, scope_of
from antefix_router.placement.directory import Directory

SIZE = 4
TOKENS = list(range(100, 140))


class Known:
    """An index, and the directory that it fills."""

    def __init__(self, **options):
        self.directory = Directory()
        self.names = FleetNames(Keyring(b"0123456789abcdef"))
        self.gone = GoneBlocks()
        self.index = EngineIndex("a", self.directory, self.names, gone=self.gone, **options)

    def tell(self, *events):
        self.index.apply(KvBatch(events=events))

    def keys(self, tokens=TOKENS, scope="", size=SIZE):
        return self.names.prompt(np.array(tokens, np.uint32), scope, size).keys

    def leading(self, tokens=TOKENS, scope="", medium=None, size=SIZE):
        holder = "a" if medium is None else f"a|{medium}"
        return int(self.directory.leading([holder], self.keys(tokens, scope, size))[0])

    def usable(self, tokens=TOKENS):
        return self.index.num_usable(self.leading(tokens), self.keys(tokens))


@pytest.fixture
def known():
    return Known()


def stored(first, last, *, tokens=TOKENS, size=SIZE, medium="GPU", parent=..., **more):
    """Blocks [first, last) of a chain whose engine hashes are their ends."""
    if parent is ...:
        parent = first * size if first else None
    return KvStored(
        block_hashes=[(index + 1) * size for index in range(first, last)],
        parent_block_hash=parent,
        token_ids=tokens[first * size : last * size],
        block_size=size,
        lora_id=None,
        medium=medium,
        lora_name=more.pop("lora", None),
        **more,
    )


def removed(*blocks, medium="GPU", **more):
    return KvRemoved(block_hashes=[(block + 1) * SIZE for block in blocks], medium=medium, **more)


def test_blocks_are_known_by_their_tokens(known):
    known.tell(stored(0, 3), stored(3, 5))
    assert known.leading() == 5
    assert known.leading(TOKENS[:8] + [1] * 20) == 2
    assert known.leading([1, *TOKENS]) == 0
    assert known.index.block_size == SIZE


def test_what_goes_is_gone_and_remembered_as_such(known):
    known.tell(stored(0, 5), removed(4, 3))
    assert known.leading() == 3
    assert known.keys()[3] in known.gone
    assert known.keys()[2] not in known.gone
    known.tell(KvCleared())
    assert known.leading() == 0
    assert len(known.index) == 0


def test_a_block_behind_an_unknown_one_has_no_name(known):
    known.tell(stored(2, 5))
    assert known.leading() == 0
    assert known.index.num_unnamed == 3
    known.tell(stored(0, 5))
    assert known.leading() == 5


def test_a_block_in_two_media_is_there_until_both_have_dropped_it(known):
    known.tell(stored(0, 4), stored(0, 4, medium="CPU"))
    known.tell(removed(3, 2))
    assert (known.leading(), known.leading(medium="GPU"), known.leading(medium="CPU")) == (4, 2, 4)
    assert known.keys()[3] not in known.gone
    known.tell(removed(3, medium="CPU"))
    assert (known.leading(), known.leading(medium="CPU")) == (3, 3)


def test_a_remote_disk_counts_as_the_engines_own_and_far(known):
    known.tell(stored(0, 2), stored(0, 4, medium="EXTERNAL", locality="REMOTE"))
    assert (known.leading(), known.leading(medium="GPU"), known.leading(medium="STORAGE")) == (4, 2, 4)


def test_full_groups_must_all_hold_a_block(known):
    known.tell(stored(0, 4, group_idx=0, kv_cache_spec_kind="full_attention"))
    known.tell(stored(0, 3, group_idx=1, kv_cache_spec_kind="mla_attention"))
    known.tell(removed(1, group_idx=1))
    assert known.leading() == 1


def test_a_hit_ends_where_a_window_group_has_what_it_needs(known):
    known.tell(stored(0, 6, group_idx=0, kv_cache_spec_kind="full_attention"))
    assert known.usable() == 6
    # The window's group caches only the ends of blocks 2 and 4, so its event has more tokens than blocks.
    window = stored(0, 5, group_idx=1, kv_cache_spec_kind="sliding_window", kv_cache_spec_sliding_window=SIZE)
    window.block_hashes = [window.block_hashes[1], window.block_hashes[3]]
    known.tell(window)
    assert (known.leading(), known.usable()) == (6, 4)
    assert known.usable(TOKENS[:12]) == 2
    known.tell(removed(3, group_idx=1))
    assert known.usable() == 2


def test_a_window_group_may_speak_first(known):
    known.tell(stored(0, 4, group_idx=0, kv_cache_spec_kind="sliding_window"))
    known.tell(stored(0, 4, group_idx=1, kv_cache_spec_kind="full_attention"))
    assert known.usable() == 4


def test_a_groups_smaller_blocks_are_no_prefix_of_their_own(known):
    """As in DeepSeek-V4's layout, the full group has blocks of 8 and the window's group blocks of 4."""
    known.tell(stored(0, 4, size=8, group_idx=2, kv_cache_spec_kind="full_attention"))
    window = stored(4, 8, size=4, group_idx=0, kv_cache_spec_kind="sliding_window_mla")
    known.tell(window)
    keys = known.keys(size=8)
    assert known.leading(size=8) == 4
    assert known.index.num_usable(4, keys) == 4
    assert known.index.num_usable(2, keys) == 0


def test_salts_and_adapters_are_kept_apart(known):
    known.tell(stored(0, 3, extra_keys=[["salt"], None, None]), stored(3, 4))
    assert known.leading() == 0
    assert known.leading(scope=scope_of(salt="salt")) == 4
    other = Known()
    other.tell(stored(0, 3, lora="adapter", extra_keys=[["adapter"], ["adapter"], ["adapter"]]))
    assert other.leading() == 0
    assert other.leading(scope=scope_of(lora="adapter")) == 3


def test_sglangs_salt_counts_as_vllms(known):
    known.tell(stored(0, 1, cache_salt="salt"), stored(1, 2, cache_salt="salt"))
    assert known.leading(scope=scope_of(salt="salt")) == 2


def test_what_hangs_on_a_picture_has_no_name(known):
    known.tell(stored(0, 4, extra_keys=[None, None, [["picture", 3]], [["picture", 3]]]))
    assert known.leading() == 2
    known.tell(stored(4, 5))
    assert known.leading() == 2


def test_an_engine_with_more_blocks_than_may_be_followed_is_forgotten():
    known = Known(num_blocks_max=3)
    known.tell(stored(0, 4))
    assert known.leading() == 0


def test_what_is_forgotten_is_forgotten_in_every_medium(known):
    known.tell(stored(0, 4), stored(0, 4, medium="CPU"))
    known.index.confirm()
    known.index.forget()
    assert (known.leading(), known.leading(medium="GPU"), known.leading(medium="CPU")) == (0, 0, 0)
    # The engine still sends events, so the router's own placements are not taken as new blocks.
    known.directory.guess("a", known.keys())
    assert known.leading() == 0
    known.index.doubt()
    known.directory.guess("a", known.keys())
    assert known.leading() == 10


def test_an_event_that_is_told_again_changes_nothing(known):
    known.tell(stored(0, 4), stored(0, 4), removed(3), removed(3))
    assert known.leading() == 3


def test_hashes_of_bytes_that_differ_anywhere_are_different(known):
    event = stored(0, 2)
    event.block_hashes = [bytes(31) + b"\x01", bytes(31) + b"\x02"]
    known.tell(event)
    known.tell(KvRemoved(block_hashes=[bytes(31) + b"\x02"], medium="GPU"))
    assert known.leading() == 1
