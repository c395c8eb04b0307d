"""Picking experts, and sorting picks by expert, take one launch each and agree with torch."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from antefix.model import ModelConfig, moe
from antefix_kernels import expert_routing, linear
from tests.kernels.test_triton_ops import CONFIG


@pytest.mark.parametrize(("num_tokens", "num_experts", "num_picked"), [(1, 4, 2), (9, 7, 3), (3, 256, 6), (2, 2, 2)])
@pytest.mark.parametrize("hashed", [False, True])
def test_the_picks_and_weights_of_the_router(device, draw, monkeypatch, num_tokens, num_experts, num_picked, hashed):
    fields = CONFIG | {"n_routed_experts": num_experts, "num_experts_per_tok": num_picked}
    router = moe.ExpertRouter(ModelConfig.from_dict(fields), hash_routed=hashed).to(device).requires_grad_(False)
    router.weight.normal_(generator=draw)
    tokens = torch.randint(64, (num_tokens,), generator=draw, device=device)
    x = torch.randn(num_tokens, 32, generator=draw, device=device)
    if hashed:
        router.tid2eid.copy_(torch.rand(64, num_experts, generator=draw, device=device).argsort(1)[:, :num_picked])
    else:
        router.e_score_correction_bias.normal_(generator=draw)
        # Of equal scores the lowest id is picked.
        x[0] = 0
        router.e_score_correction_bias[: num_experts // 2 + 1] = 9.0
    with torch.no_grad():
        logits = torch.nn.functional.linear(x, router.weight)
        scores = moe.expert_scores(logits, router.scoring)
        monkeypatch.setattr(moe, "has_kernels", lambda _: False)
        want = router(x, tokens)
        given = {"tokens": tokens, "table": router.tid2eid} if hashed else {"bias": router.e_score_correction_bias}
        of_scores = expert_routing.pick_experts(scores, num_picked, router.scaling, **given)
        of_logits = expert_routing.pick_experts(logits, num_picked, router.scaling, are_logits=True, **given)
    for got in (of_scores, of_logits):
        assert torch.equal(got[0], want[0])
        torch.testing.assert_close(got[1], want[1])


@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "num_picked", "tile"),
    [(1, 4, 2, 64), (1, 256, 6, 64), (13, 5, 3, 4), (40, 3, 2, 16), (7, 300, 6, 8)],
)
def test_sorted_picks(device, draw, monkeypatch, num_tokens, num_experts, num_picked, tile):
    picks = torch.rand(num_tokens, num_experts, generator=draw, device=device).argsort(1)[:, :num_picked]
    # Most picks go to one expert.
    picks[num_tokens // 3 :, 0] = num_experts - 1
    monkeypatch.setattr(expert_routing, "ENABLED", True)
    got = linear.route(picks, num_experts, tile=tile)
    monkeypatch.setattr(expert_routing, "ENABLED", False)
    want = linear.route(picks, num_experts, tile=tile)
    for name in ("order", "place", "experts"):
        assert torch.equal(getattr(got, name), getattr(want, name)), name
    used = want.experts < num_experts
    for name in ("firsts", "stops"):
        assert torch.equal(getattr(got, name)[used], getattr(want, name)[used]), name
    assert got.num_picked == want.num_picked
