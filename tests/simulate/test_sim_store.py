"""The simulated store keeps what the engine keeps: prefix-closed, within budget, checkpoints until they expire."""

from __future__ import annotations

import numpy as np

from antefix.window import Sizes, Tier
from antefix_simulate.simulated_store import SimStore, StoreLimits

SIZES = Sizes(block_size=128, block_bytes=100, checkpoint_bytes=50, window_tokens=128, replay_reach=(255, 128))


def _names(*names: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.asarray(names, dtype=np.int64)


def _store(store_bytes: int | None = None, pool_bytes: int | None = None) -> SimStore:
    return SimStore(SIZES, StoreLimits(store_bytes=store_bytes, pool_bytes=pool_bytes), unit_blocks=1)


def _checkpoint(store: SimStore, names: np.ndarray[tuple[int], np.dtype[np.int64]], units: int, now_s: float) -> None:
    store.put_checkpoint(names, units, tier=Tier.DISK, ttl_s=60, now_s=now_s, cost_s=0.0)


def test_a_prefix_is_found_as_far_as_it_is_stored() -> None:
    store = _store()
    store.put_units(_names(1, 2, 3), 0, 0.0, 0.0)
    assert store.num_stored(_names(1, 2, 9)) == 2
    assert store.num_stored(_names(9, 8, 7)) == 0
    assert store.num_stored(_names()) == 0


def test_a_checkpoint_is_found_until_its_time_and_use_prolongs_it() -> None:
    store, names = _store(), _names(1, 2, 3)
    store.put_units(names, 0, 0.0, 0.0)
    _checkpoint(store, names, 2, 0.0)
    assert store.last_checkpoint(names, 3, 59.0) == (2, Tier.DISK)
    assert store.last_checkpoint(names, 1, 59.0) is None
    store.touch_checkpoint(names, 2, Tier.DISK, 59.0)
    assert store.last_checkpoint(names, 3, 100.0) == (2, Tier.DISK)
    assert store.last_checkpoint(names, 3, 119.0) is None


def test_an_expired_checkpoint_can_be_left_anew() -> None:
    store, names = _store(), _names(1, 2)
    store.put_units(names, 0, 0.0, 0.0)
    _checkpoint(store, names, 1, 0.0)
    store.expire(61.0)
    assert store.checkpoint_bytes_kept() == 0
    _checkpoint(store, names, 1, 61.0)
    assert store.last_checkpoint(names, 2, 62.0) == (1, Tier.DISK)
    assert store.bytes_kept == 2 * 100 + 50


def test_sweeping_gives_back_expired_bytes_only() -> None:
    store, names = _store(), _names(1, 2)
    store.put_units(names, 0, 0.0, 0.0)
    _checkpoint(store, names, 1, 0.0)
    _checkpoint(store, names, 2, 30.0)
    store.sweep(70.0)
    assert store.bytes_kept == 2 * 100 + 50
    assert store.last_checkpoint(names, 2, 70.0) == (2, Tier.DISK)


def test_eviction_takes_the_oldest_leaves_and_never_an_ancestor() -> None:
    store = _store(store_bytes=500)
    store.put_units(_names(1, 2, 3), 0, 0.0, 0.0)
    store.put_units(_names(11, 12), 0, 10.0, 0.0)
    store.put_units(_names(21), 0, 20.0, 0.0)
    assert store.bytes_kept <= 500
    assert 0 < store.num_stored(_names(1, 2, 3)) < 3
    assert store.num_stored(_names(11, 12)) == 2
    assert store.num_stored(_names(21)) == 1


def test_a_prefix_larger_than_the_store_is_kept_as_far_as_it_fits() -> None:
    store = _store(store_bytes=250)
    assert store.put_units(_names(1, 2, 3, 4), 0, 0.0, 0.0) == 2
    assert store.bytes_kept == 200
    assert store.num_refused == 2


def test_the_pool_has_its_own_budget_and_does_not_count_as_disk() -> None:
    store, names = _store(pool_bytes=100), _names(1, 2, 3)
    store.put_units(names, 0, 0.0, 0.0)
    for unit in (1, 2, 3):
        store.put_checkpoint(names, unit, tier=Tier.POOL, ttl_s=60, now_s=float(unit), cost_s=0.0)
    assert store.bytes_kept == 300
    assert store.checkpoint_bytes_kept(Tier.POOL) <= 100
    assert store.last_checkpoint(names, 3, 5.0) == (3, Tier.POOL)
    assert store.last_checkpoint(names, 1, 5.0) is None


def test_no_checkpoint_hangs_on_a_block_that_is_not_stored() -> None:
    store = _store()
    _checkpoint(store, _names(1, 2), 2, 0.0)
    assert store.num_checkpoints_written == 0
