"""A step's numbers, computed in one launch, are those of torch's operations."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from antefix_kernels.step_numbers import step_numbers

WINDOW, BLOCK, RATIOS = 16, 32, (4, 16)


@pytest.mark.parametrize("num_blocks", [3, 1100])
@pytest.mark.parametrize("write", [True, False])
def test_numbers_of_a_step(device, num_blocks, write):
    position = torch.tensor([0, 3, 15, 63, 90], dtype=torch.int32)
    seat = torch.tensor([1, 4, 2, 0, 3], dtype=torch.int32)
    cut = torch.tensor([0, 2, 0, 60, 0], dtype=torch.int32)
    tables = (torch.arange(5 * num_blocks, dtype=torch.int32) * 7 % 1001).view(5, num_blocks)
    integers = torch.cat((torch.stack((position * 0 + 5, position, seat, cut), 1), tables), 1).to(device)
    main, other = (torch.rand(6, device=device) for _ in range(2))
    found = step_numbers(integers, window=WINDOW, block_size=BLOCK, ratios=RATIOS, main=main, other=other, write=write)
    position, seat, cut, tables = (each.to(device) for each in (position, seat, cut, tables))
    counts = (position + 1 - cut).clamp(max=WINDOW)
    slot = seat * (2 * WINDOW) + position % WINDOW
    assert torch.equal(found.position, position) and torch.equal(found.seat, seat) and not found.none.any()
    assert torch.equal(found.tables, tables) and torch.equal(found.counts, counts)
    assert torch.equal(found.firsts, seat * (2 * WINDOW) + (position + 1 - counts) % WINDOW)
    assert torch.equal(found.window_slots, torch.cat((slot, slot + WINDOW)))
    starts = [position, position]
    for ratio, group in zip(RATIOS, found.closing, strict=True):
        entry, per_block = position // ratio, BLOCK // ratio
        block = tables.gather(1, (entry // per_block).long().unsqueeze(1)).squeeze(1)
        closes = ((position + 1) % ratio == 0) & (seat > 0)
        slots = torch.where(closes & write, block * per_block + entry % per_block, -1)
        assert torch.equal(group.slots, slots) and torch.equal(group.closes, closes.int())
        assert torch.equal(group.first_rows, seat * (2 * ratio)) and torch.equal(group.prior_rows, -1 - seat)
        assert torch.equal(group.visible, (position + 1) // ratio)
        starts.append(entry * ratio)
    for start, frequencies, angles in zip(starts, (main, other, other, other), found.angles, strict=True):
        assert torch.equal(angles, start.float()[:, None] * frequencies)
    assert (found.turns[0] == 1).all() and (found.turns[1] == 0).all()
