"""NaN and infinity in stored KV are found in packed form in every place, and no other value is reported."""

import numpy as np
import pytest
import torch

from antefix.errors import BlockCorrupt
from antefix.layout import KVFormat
from antefix.model import WindowState
from antefix.model.card_pool import CardPool
from antefix.model.finite import MAGNITUDE_MAX, are_numbers, is_usable, unusable_on_card, unusable_rows
from antefix.model.pool import BlockPool
from antefix.model.quant import pack, unpack, width_of
from antefix.model.window_state import DraftState, _are_plainly_usable, state_bytes
from tests.model.test_block_pool import layout as layout_in


@pytest.fixture(params=list(KVFormat))
def layout(request):
    return layout_in(request.param)


def rows_of(layout, num_blocks=4, scale=1.0):
    generator = torch.Generator().manual_seed(0)
    rows = np.zeros((num_blocks, layout.block_bytes), np.uint8)
    for part in layout.parts:
        values = scale * torch.randn(num_blocks, part.num_rows, width_of(part, layout), generator=generator)
        packed = pack(part.kind, values, layout).reshape(num_blocks, -1)
        rows[:, part.offset : part.offset + part.nbytes] = packed.numpy()
    return rows


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1.0, 1e6, 1e12])
def test_what_a_model_computes_passes(layout, scale):
    assert not unusable_rows(rows_of(layout, scale=scale), layout).any()
    assert not unusable_rows(np.zeros((3, layout.block_bytes), np.uint8), layout).any()


def test_every_byte_of_a_row_is_looked_at_by_what_it_means(layout):
    """Compares with decoding: exactly those bytes are found that make a value of the row not finite or beyond the
    limit.

    A scale may be refused slightly before its values reach the limit, but never after.
    """
    rows = rows_of(layout, 1)
    for at in range(layout.block_bytes):
        for byte in (0x7F, 0xFF, 0x80, 0xD7):
            changed = rows.copy()
            changed[0, at] = byte
            usable = all(is_usable(unpack(part.kind, records_of(changed, part), layout)) for part in layout.parts)
            found = bool(unusable_rows(changed, layout)[0])
            assert found or usable, (at, byte)
            if found and usable:
                assert layout.kv_format is KVFormat.FP8 and byte in (0xFF, 0xD7), (at, byte)


def records_of(rows, part):
    return torch.from_numpy(rows[:, part.offset : part.offset + part.nbytes].copy()).view(1, part.num_rows, -1)


def test_only_the_row_that_has_it_is_named(layout):
    rows = rows_of(layout)
    rows[2, layout.parts[-1].offset : layout.parts[-1].offset + layout.parts[-1].nbytes] = 0xFF
    assert unusable_rows(rows, layout).tolist() == [False, False, True, False]
    pool = BlockPool(layout, 8)
    ids = [6, 1, 2, 5]
    for row, landing in zip(rows, pool.landing(ids), strict=True):
        landing[:] = row.tobytes()
    assert pool.unusable(ids) == [2]
    assert pool.unusable([6, 1, 5]) == [] and pool.unusable([]) == []


def test_a_card_finds_the_same_rows():
    layout = layout_in(KVFormat.FP8)
    rows = np.repeat(rows_of(layout, 1), 4 * layout.block_bytes, axis=0)
    at = np.arange(layout.block_bytes)
    for number, byte in enumerate((0x7F, 0xFF, 0x80, 0xD7)):
        rows[number * len(at) + at, at] = byte
    # Rows that do not lie one after another are checked field by field.
    apart = np.zeros((len(rows), layout.block_bytes + 1), np.uint8)[:, :-1]
    apart[:] = rows
    found = unusable_on_card(torch.from_numpy(rows), torch.arange(len(rows)), layout)
    assert found is not None and np.array_equal(found.numpy(), unusable_rows(apart, layout))
    assert np.array_equal(unusable_rows(rows, layout), unusable_rows(apart, layout))
    assert 0 < found.sum() < len(found)


def test_a_card_pool_takes_in_rows_up_to_the_first_bad_one():
    layout = layout_in(KVFormat.FP8)
    pool, rows = CardPool(layout, 5, "cpu"), rows_of(layout)
    assert pool.fill([]) == []
    for row, landing in zip(rows, pool.landing([4, 1, 3, 0]), strict=True):
        landing[:] = row.tobytes()
    assert pool.fill([4, 1, 3, 0]) == []
    assert np.array_equal(pool.rows[[4, 1, 3, 0]].numpy(), rows)
    pool.landing([3])[0][:] = b"\xff" * layout.block_bytes
    assert pool.fill([4, 3, 0]) == [3]
    assert pool.unusable([0, 3, 1]) == [3]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 2 * MAGNITUDE_MAX])
def test_window_state_with_what_is_no_number_is_corrupt(layout, value):
    if layout.kv_format is KVFormat.FP8 and value == 2 * MAGNITUDE_MAX:
        pytest.skip("the packed window holds smaller numbers")
    block = layout.geometry.block_size
    state = WindowState(layout, block)
    WindowState.from_bytes(layout, block, state.to_bytes())
    for tensor in (state.window, *(state.main[layer].overlap for layer in state.main)):
        if tensor is None or not tensor.numel():
            continue
        before = tensor.clone()
        tensor.view(-1)[0] = value
        assert not state.is_usable
        data = state.to_bytes()
        tensor.copy_(before)
        with pytest.raises(BlockCorrupt, match="NaN, infinity"):
            WindowState.from_bytes(layout, block, data)
    assert state.is_usable


def test_logits():
    good = np.array([-3.0, 1e30, 0.0], np.float32)
    assert are_numbers(good) and are_numbers(good[:0])
    for bad in (np.nan, np.inf, -np.inf):
        assert not are_numbers(np.append(good, np.float32(bad)))


@pytest.mark.parametrize("drafts", [False, True])
def test_packed_window_state_passes_unless_a_value_of_it_must_be_looked_at(layout, drafts):
    """Compares with decoding: a state whose bytes pass is usable."""
    position = 3 * layout.geometry.block_size - 1
    state = WindowState(layout, position)
    for piece in (state.window, *state._float_pieces()):
        piece.copy_(torch.randn(piece.shape, generator=torch.Generator().manual_seed(0)))
    if drafts:
        state.draft = DraftState.empty(layout, 0)
        state.draft.end, state.draft.streams = position - 1, torch.randn(64)
    data = state.to_bytes()
    assert _are_plainly_usable(layout, position, data)
    num_refused = 0
    first = state_bytes(layout, position)
    for at in range(1, len(data), 37):
        if first <= at <= first + 8:
            continue  # where a draft state begins is checked by itself
        for two in (b"\x80\x7f", b"\xff\xff"):
            changed = bytearray(data)
            changed[at - 1 : at + 1] = two
            passes = _are_plainly_usable(layout, position, bytes(changed))
            num_refused += not passes
            if passes:
                WindowState.from_bytes(layout, position, bytes(changed))
    assert num_refused > 0
    empty = WindowState(layout, layout.geometry.block_size)
    assert _are_plainly_usable(layout, empty.position, empty.to_bytes()) == (layout.overlap_bytes == 0)
