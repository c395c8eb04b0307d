"""Routed kernels over a rank's own experts: the ranks' merged result has the bits of one rank alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from antefix.layout import KVFormat
from antefix.model import Model, load_model
from antefix.model.moe import MoE
from antefix.model.ranks import Ranks
from antefix_console.verify.models import config_of, make_share
from tests.model import released_checkpoint as released


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Merging(Ranks):
    """Adds this rank's result to those of the earlier ranks. For the last rank, the sum is the merged result."""

    given: list[Tensor]

    def merge(self, x: Tensor, is_mine: Tensor) -> Tensor:
        self.given.append(torch.where(is_mine, x, -0.0))
        return torch.stack(self.given).sum(0)


def packed(directory: Path, device: torch.device, ranks: Ranks | None) -> MoE:
    changes = {"n_routed_experts": 4, "num_hidden_layers": 2, "compress_ratios": [0, 4, 0]}
    if not directory.exists():
        released.write("flash", directory, **changes)
    return _moe(load_model(directory, device=device, ranks=ranks))


def plain(_: Path, device: torch.device, ranks: Ranks | None) -> MoE:
    return _moe(make_share(ranks, str(device), fields=config_of("pro"), kv_format=KVFormat.FP8, seed=1))


def _moe(model: Model) -> MoE:
    moe: MoE = model.model.layers[1].mlp  # type: ignore[union-attr, assignment]
    return moe


def _with_picks(moe: MoE, picks: Tensor, weights: Tensor) -> MoE:
    moe.gate.forward = lambda *_: (picks, weights)  # type: ignore[method-assign]
    return moe


@pytest.mark.slow
@pytest.mark.parametrize(("make", "width"), [(packed, 128), (plain, 32)])
def test_merged_rows_are_those_of_one_rank(
    tmp_path: Path,
    device: torch.device,
    make: Callable[[Path, torch.device, Ranks | None], MoE],
    width: int,
) -> None:
    size, directory = 2, tmp_path / "model"
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(5, width, generator=generator).to(device)
    weights = torch.rand(5, 2, generator=generator).to(device)
    # No token picks the last expert, and one token picks no expert of the second rank.
    picks = torch.tensor([[0, 1], [0, 2], [1, 2], [0, 2], [1, 2]], device=device)
    with torch.inference_mode():
        want = _with_picks(make(directory, device, None), picks, weights)._on_card(x, picks[:, 0])
        given: list[Tensor] = []
        for rank in range(size):
            share = make(directory, device, Merging(rank=rank, size=size, given=given))
            assert len(share.experts.gate_up_proj) == 4 // size
            got = _with_picks(share, picks, weights)._on_card(x, picks[:, 0])
        # Each row has one owner. All addends of the other ranks are -0.0.
        others = torch.stack([torch.signbit(each) & (each == 0) for each in given])
        assert (others.all(2).sum(0) == size - 1).all()
        assert torch.equal(got, want)
