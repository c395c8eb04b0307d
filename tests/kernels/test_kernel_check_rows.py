"""The kernel that checks rows finds the rows that the host's check finds."""

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from antefix.layout import KVFormat
from antefix.model.finite import _pairs, unusable_rows
from antefix_kernels.check_rows import rows_over
from tests.model.test_block_pool import layout as layout_in
from tests.model.test_finite import rows_of


def test_the_same_rows_are_found_as_on_the_host(device):
    layout = layout_in(KVFormat.FP8)
    rows = np.repeat(rows_of(layout, 1), 400, axis=0)
    random = np.random.default_rng(0)
    for number in range(0, len(rows), 2):
        rows[number, random.integers(layout.block_bytes)] = (0x7F, 0xFF, 0x80, 0xD7)[number // 2 % 4]
    ids = random.permutation(len(rows))[:300]
    bounds = _pairs(layout, device)
    assert bounds is not None
    found = rows_over(torch.from_numpy(rows).to(device), torch.from_numpy(ids).to(device), *bounds)
    want = unusable_rows(rows, layout)[ids]
    assert found.dtype is torch.bool and np.array_equal(found.cpu().numpy(), want)
    assert 0 < want.sum() < len(want)


def test_a_row_of_several_programs_is_searched_to_its_end(device):
    """Every pair of bytes has its own limit, and a row has more pairs than one program reads."""
    num_pairs = 9001
    limits = torch.full((2, num_pairs), 7, dtype=torch.int32, device=device)
    masks = torch.full((2, num_pairs), 0xFFFF, dtype=torch.int32, device=device)
    limits[0, 8999], limits[1, 0] = 5, 6
    rows = torch.zeros(5, 2 * num_pairs, dtype=torch.uint8, device=device)
    rows[1, 2 * 8999], rows[2, 0], rows[3, 1], rows[4, 2 * 8998] = 6, 7, 0x80, 7
    ids = torch.arange(5, device=device)
    assert rows_over(rows, ids, masks, limits).tolist() == [False, True, True, True, False]
    assert rows_over(rows, ids[:0], masks, limits).tolist() == []
    with pytest.raises(ValueError, match="two numbers per pair"):
        rows_over(rows[:, 2:].contiguous(), ids, masks, limits)
