"""The pool's rows are the disk's payloads; references are counted and the pool is bounded."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from antefix.errors import InternalError, Overloaded
from antefix.layout import BlockLayout, KVFormat, KVGeometry, LayerKind, PartKind
from antefix.model import BlockPool


def layout(kv_format: KVFormat = KVFormat.FP8) -> BlockLayout:
    geometry = KVGeometry(
        layers=(LayerKind.WINDOW, LayerKind.CSA, LayerKind.HCA),
        head_dim=40,
        rope_dim=8,
        indexer_dim=32,
        csa_ratio=4,
        hca_ratio=8,
        window=8,
    )
    return BlockLayout(geometry=geometry, kv_format=kv_format)


def test_blocks_come_side_by_side_where_there_is_room() -> None:
    pool = BlockPool(layout(), 8)
    assert pool.allocate(3) == [0, 1, 2]
    assert pool.allocate(2) == [3, 4]
    pool.release([1])
    assert pool.allocate(2) == [5, 6]
    assert pool.allocate(2) == [1, 7]
    assert pool.num_free == 0


def test_a_sequence_grows_into_the_next_block() -> None:
    pool = BlockPool(layout(), 8)
    first, second = pool.allocate(2), pool.allocate(1)
    pool.release([1])
    assert first == [0, 1]
    assert pool.allocate(1, after=second[-1]) == [3]
    assert pool.allocate(1, after=0) == [1]
    assert pool.allocate(1, after=7) == [4]


def test_an_empty_pool_refuses_and_gives_nothing() -> None:
    pool = BlockPool(layout(), 3)
    pool.allocate(2)
    with pytest.raises(Overloaded, match="1 of 3 blocks free, 2 are needed"):
        pool.allocate(2)
    assert pool.num_free == 1
    assert pool.allocate(0) == []


@pytest.mark.parametrize("wrong", [[1], [-1], [2], [0, 0]])
def test_releasing_what_is_not_held_is_refused(wrong: list[int]) -> None:
    pool = BlockPool(layout(), 2)
    pool.allocate(1)
    with pytest.raises(InternalError):
        pool.release(wrong)
    assert pool.num_free == 1


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.sampled_from(["allocate", "release"]), st.integers(0, 5)), max_size=40))
def test_no_block_is_given_twice(steps: list[tuple[str, int]]) -> None:
    pool, held = BlockPool(layout(), 12), set[int]()
    for verb, number in steps:
        if verb == "allocate" and number <= 12 - len(held):
            new = pool.allocate(number)
            assert len(set(new)) == number and not held & set(new)
            held |= set(new)
        elif verb != "allocate" and held:
            block = sorted(held)[number % len(held)]
            pool.release([block])
            held.remove(block)
        assert pool.num_free == 12 - len(held)


@pytest.mark.parametrize("kv_format", list(KVFormat))
def test_bytes_put_into_a_row_read_back_as_the_values_that_were_packed(kv_format: KVFormat) -> None:
    plan = layout(kv_format)
    source, target = BlockPool(plan, 3), BlockPool(plan, 3)
    for part in plan.parts:
        width = source.decoded(part).shape[-1]
        rows = torch.arange(part.num_rows)
        source.write(part, torch.full_like(rows, 1), rows, torch.randn(part.num_rows, width))
    assert len(source.payloads([1])[0]) == plan.block_bytes
    target.payloads([2])[0][:] = source.payloads([1])[0]
    target.note_filled([2])
    for part in plan.parts:
        assert source.decoded(part)[1].abs().sum() > 0
        assert torch.equal(target.decoded(part)[2], source.decoded(part)[1])
        assert torch.equal(target.records(part)[2], source.records(part)[1])
    assert not torch.as_tensor(np.frombuffer(target.payloads([0])[0], np.uint8)).any()


def test_many_blocks_are_decoded_in_any_order_and_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """In pieces of three blocks, some of them neighbours."""
    plan = layout()
    monkeypatch.setattr("antefix.model.pool._DECODE_BYTES", 3 * plan.block_bytes)
    source, target = BlockPool(plan, 12), BlockPool(plan, 12)
    target.touch(5 * plan.block_bytes)
    blocks = torch.arange(12)
    for part in plan.parts:
        for row in range(part.num_rows):
            source.write(part, blocks, torch.full_like(blocks, row), torch.randn(12, source.decoded(part).shape[-1]))
    ids = [4, 5, 6, 11, 2, 0, 9, 8, 7, 1]
    for into, payload in zip(target.landing(ids), source.payloads(ids), strict=True):
        into[:] = payload
    assert target.fill(ids) == []
    for part in plan.parts:
        assert torch.equal(target.decoded(part)[ids], source.decoded(part)[ids])
        assert not target.decoded(part)[[3, 10]].any()


def test_each_part_lies_where_the_layout_says() -> None:
    plan = layout()
    pool = BlockPool(plan, 2)
    part = pool.part(1, PartKind.INDEXER_KEYS)
    pool.write(part, torch.tensor([1]), torch.tensor([part.num_rows - 1]), torch.ones(1, 32))
    written = np.flatnonzero(np.frombuffer(pool.payloads([1])[0], np.uint8))
    assert written.min() >= part.offset + (part.num_rows - 1) * part.record.nbytes
    assert written.max() < part.offset + part.nbytes


def test_cleared_rows_hold_nothing_of_their_last_owner() -> None:
    pool = BlockPool(layout(), 2)
    pool.payloads([1])[0][:] = bytes([7]) * pool.layout.block_bytes
    pool.clear([1])
    assert not any(pool.payloads([1])[0])


def test_a_pool_needs_a_block() -> None:
    with pytest.raises(InternalError, match="at least one block"):
        BlockPool(layout(), 0)


def test_one_block_of_one_entry_is_decoded_whatever_its_row_is_aligned_to() -> None:
    """The row has an odd number of bytes: 48 of the entry and 9 of the key."""
    geometry = KVGeometry(
        layers=(LayerKind.CSA,), head_dim=32, rope_dim=8, indexer_dim=16, csa_ratio=8, hca_ratio=4, window=8
    )
    one = BlockLayout(geometry=geometry, kv_format=KVFormat.FP8)
    assert one.block_bytes == 57
    pool = BlockPool(one, 3)
    part = pool.part(0, PartKind.CSA_MAIN)
    blocks = torch.arange(3)
    pool.write(part, blocks, torch.zeros(3, dtype=torch.long), torch.randn(3, 32))
    wanted = pool.decoded(part).clone()
    for block in range(3):
        pool.decoded(part).zero_()
        pool.note_filled([block])
        assert torch.equal(pool.decoded(part)[block], wanted[block])
