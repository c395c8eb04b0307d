"""Routed kernels over a rank's own experts: what ranks merge is, to the bit, what one has alone."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor

from antefix.model import load_model
from antefix.model.moe import MoE
from antefix.model.ranks import Ranks
from tests.model import released_checkpoint as released


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Merging(Ranks):
    """Keeps what this rank would give to the sum of all, which it alone takes for the sum."""

    given: list[Tensor]

    def merge(self, x: Tensor, is_mine: Tensor) -> Tensor:
        self.given.append(torch.where(is_mine, x, -0.0))
        return self.given[-1]


def experts_of(directory: Path, device: torch.device, ranks: Ranks | None) -> MoE:
    model = load_model(directory, device=device, ranks=ranks)
    moe: MoE = model.model.layers[1].mlp  # type: ignore[union-attr, assignment]
    return moe


@pytest.mark.slow
def test_merged_rows_are_those_of_one_rank(
    tmp_path: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = 2
    directory = released.write("flash", tmp_path / "model", n_routed_experts=4, num_hidden_layers=2,
                               compress_ratios=[0, 4, 0])  # fmt: skip
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(5, 128, generator=generator).to(device)
    weights = torch.rand(5, 2, generator=generator).to(device)
    picks = torch.rand(5, 4, generator=generator).argsort(1)[:, :2].sort(1).values.to(device)
    # One expert that nobody picks, and one rank whose share is hardly picked.
    picks[picks == 3] = 0
    picks = torch.where(picks[:, :1] == picks[:, 1:], torch.tensor([0, 1], device=device), picks)
    with torch.inference_mode():
        want = experts_of(directory, device, None)._on_card(x, picks, weights)
        given: list[Tensor] = []
        for rank in range(size):
            share = experts_of(directory, device, Merging(rank=rank, size=size, given=given))
            assert len(share.experts.gate_up_proj) == 4 // size
            share._on_card(x, picks, weights)
        merged = torch.stack(given).sum(0)
        # Each row has one owner: of the others' addends none is another number than -0.0.
        others = torch.stack([torch.signbit(each) & (each == 0) for each in given])
        assert (others.all(2).sum(0) == size - 1).all()
        monkeypatch.setattr(Merging, "merge", lambda self, x, is_mine: merged)
        share = experts_of(directory, device, Merging(rank=1, size=size, given=given))
        assert torch.equal(share._on_card(x, picks, weights), want)
