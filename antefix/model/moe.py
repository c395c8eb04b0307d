"""Mixture of experts: routing by learned top-k or by token-id hash, SwiGLU experts and one shared expert.

Shapes:  N = tokens, D = hidden size, E = experts, K = experts per token, I = intermediate size.
Source:  V4 report, section 2.1; oracle: transformers' DeepseekV4SparseMoeBlock.
"""

from __future__ import annotations

import collections.abc
import contextlib
import functools
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from antefix.model.compiled.switch import is_compiled
from antefix.model.joined_weights import joined_product
from antefix.model.model_config import ModelConfig
from antefix.model.numerics import (
    has_kernels,
    linear,
    matrices_of,
    multiply_each,
    sigmoid,
    silu,
    softplus,
    wide,
)
from antefix.model.packed import PackedMatrix, PackedStack
from antefix.model.ranks import Ranks
from antefix.model.side_streams import Side

if TYPE_CHECKING:
    from antefix.model.expert_offload import ExpertOffload


class ExpertRouter(nn.Module):
    """Scores experts with `weight` [E, D]. Experts are picked by score plus bias, or by token id from `tid2eid` [vocab,
    K].
    """

    e_score_correction_bias: Tensor
    tid2eid: Tensor

    def __init__(self, config: ModelConfig, *, hash_routed: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        self.hash_routed = hash_routed
        self.num_picked = config.num_experts_per_token
        self.scaling = config.routed_scaling_factor
        self.scoring = config.scoring_func
        if hash_routed:
            table = torch.zeros(config.vocab_size, config.num_experts_per_token, dtype=torch.long)
            self.register_buffer("tid2eid", table)
        else:
            self.register_buffer("e_score_correction_bias", torch.zeros(config.num_experts))

    def forward(self, x_ND: Tensor, tokens_N: Tensor) -> tuple[Tensor, Tensor]:
        """Expert ids [N, K], ascending, and their weights [N, K]."""
        logits = linear(x_ND, self.weight)[: len(tokens_N)]
        if has_kernels(x_ND) and _routes_in_one_launch():
            return self._on_card(logits, tokens_N)
        scores = expert_scores(logits.to(wide(logits.dtype)), self.scoring)
        if self.hash_routed:
            experts = self.tid2eid[tokens_N].sort(-1).values
        else:
            experts = pick_experts(scores + self.e_score_correction_bias, self.num_picked)
        weights = scores.gather(1, experts)
        # 1e-20 as in the reference. It matters only if all scores are zero.
        return experts, weights / (_row_sums(weights) + 1e-20) * self.scaling

    def _on_card(self, logits_NE: Tensor, tokens_N: Tensor) -> tuple[Tensor, Tensor]:
        """`forward` after its product, in one kernel launch, on a GPU."""
        from antefix_kernels import expert_routing

        are_logits = self.scoring == "sqrtsoftplus"
        given = logits_NE if are_logits else expert_scores(logits_NE.float(), self.scoring)
        pick = functools.partial(
            expert_routing.pick_experts, given.contiguous(), self.num_picked, self.scaling, are_logits=are_logits
        )
        if self.hash_routed:
            return pick(tokens=tokens_N.contiguous(), table=self.tid2eid)
        return pick(bias=self.e_score_correction_bias.float())


def _routes_in_one_launch() -> bool:
    from antefix_kernels import expert_routing

    return expert_routing.ENABLED


class Experts(nn.Module):
    """All routed experts' weights: `gate_up_proj` [E, 2I, D] (gate rows first), `down_proj` [E, D, I]. Either both
    matrices are packed or neither is.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        inner, hidden = config.moe_intermediate_size, config.hidden_size
        self.gate_up_proj: nn.Parameter | PackedStack
        self.down_proj: nn.Parameter | PackedStack
        self.gate_up_proj = nn.Parameter(torch.empty(config.num_experts, 2 * inner, hidden))
        self.down_proj = nn.Parameter(torch.empty(config.num_experts, hidden, inner))
        self.limit = config.swiglu_limit
        self.num_experts = config.num_experts
        # Set where experts are split over ranks; the stacks then hold this rank's experts.
        self.ranks: Ranks | None = None
        # Set where the stacks are fetched from the host for each use; `layer` is this layer's number there.
        self.offload: ExpertOffload | None = None
        self.layer = 0

    def fetched(self) -> contextlib.AbstractContextManager[None]:
        """Inside this context the stacks of experts can be read."""
        return contextlib.nullcontext() if self.offload is None else self.offload.use(self.layer)

    def forward(self, x_ND: Tensor, experts_NK: Tensor, weights_NK: Tensor) -> Tensor:
        """The outputs of each token's experts, weighted and summed in ascending order of expert id: [N, D]."""
        num_tokens, num_picked = experts_NK.shape
        # 1. Sort the (token, slot) pairs by expert, so that each expert sees its tokens as one run of rows.
        order = experts_NK.flatten().argsort(stable=True)
        counts = torch.bincount(experts_NK.flatten(), minlength=self.num_experts).tolist()
        rows = x_ND.index_select(0, order // num_picked)
        # 2. Run the picked experts. With several ranks, each runs its own.
        first, stop = (0, self.num_experts) if self.ranks is None else self.ranks.span(self.num_experts)
        begin = sum(counts[:first])
        own = rows[begin : begin + sum(counts[first:stop])]
        done = self._run(own, counts[first:stop]) if len(own) else own
        # 3. Back to token order. One small product per token fixes the order of the sum.
        if self.ranks is not None:
            share = self.num_experts // self.ranks.size
            done = self.ranks.gather_rows(done, [sum(counts[i : i + share]) for i in range(0, len(counts), share)])
        slots = done.index_select(0, order.argsort()).view(num_tokens, num_picked, -1)
        return multiply_each(weights_NK.to(slots.dtype).unsqueeze(1), slots).squeeze(1)

    def _run(self, rows_RD: Tensor, counts: list[int]) -> Tensor:
        """Run rows that are sorted by expert, `counts` rows for each, through their experts."""
        gate_up, down = (self._matrices(stack, len(counts)) for stack in (self.gate_up_proj, self.down_proj))
        picked = [expert for expert, count in enumerate(counts) if count]
        sizes = [counts[expert] for expert in picked]
        parts = zip(rows_RD.split(sizes), picked, strict=True)
        # One activation for all rows, because it consists of a dozen small operations.
        inner = clamped_swiglu(_joined([linear(part, gate_up[expert]) for part, expert in parts]), self.limit)
        return _joined([linear(part, down[e]) for part, e in zip(inner.split(sizes), picked, strict=True)])

    @staticmethod
    def _matrices(stack: Tensor | PackedStack, count: int) -> collections.abc.Sequence[Tensor | PackedMatrix]:
        return [stack[i] for i in range(count)] if isinstance(stack, PackedStack) else matrices_of(stack, count)


class SharedExpert(nn.Module):
    """The shared expert, which every token uses."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        inner, hidden = config.moe_intermediate_size, config.hidden_size
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)
        self.limit = config.swiglu_limit

    def forward(self, x_ND: Tensor) -> Tensor:
        if has_kernels(x_ND):
            from antefix_kernels.tokens import swiglu

            return linear(swiglu(self._gate_up(x_ND), self.limit), self.down_proj.weight)
        gate = linear(x_ND, self.gate_proj.weight).clamp(max=self.limit)
        up = linear(x_ND, self.up_proj.weight).clamp(-self.limit, self.limit)
        return linear(silu(gate) * up, self.down_proj.weight)

    def _gate_up(self, x_ND: Tensor) -> Tensor:
        """Gates, then ups, [N, 2 I]; on a GPU."""
        joined = joined_product(x_ND, (self.gate_proj, self.up_proj))
        if joined is not None:
            return joined
        return torch.cat((linear(x_ND, self.gate_proj.weight), linear(x_ND, self.up_proj.weight)), dim=1)


class MoE(nn.Module):
    """A layer's feed-forward part."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.gate = ExpertRouter(config, hash_routed=config.hash_routed[layer])
        self.experts = Experts(config)
        self.shared_experts = SharedExpert(config)

    def forward(self, x_ND: Tensor, tokens_N: Tensor) -> Tensor:
        """x_ND may have padding rows behind the tokens' rows. The output has the same padding rows; their values mean
        nothing.
        """
        num_tokens = len(tokens_N)
        if is_compiled(x_ND) and takes_compiled(self):
            from antefix.model.compiled.experts import run

            return run(self, x_ND, tokens_N)
        if has_kernels(x_ND):
            done = self._on_card(x_ND[:num_tokens], tokens_N)
            missing = len(x_ND) - num_tokens
            return nn.functional.pad(done, (0, 0, 0, missing)) if missing else done
        experts, weights = self.gate(x_ND, tokens_N)
        with self.experts.fetched():
            routed: Tensor = self.experts(x_ND[:num_tokens], experts, weights)
        shared: Tensor = self.shared_experts(x_ND)
        if len(x_ND) == num_tokens:
            return routed + shared
        shared[:num_tokens] += routed
        return shared

    def _on_card(self, x_ND: Tensor, tokens_N: Tensor) -> Tensor:
        """All experts in one product. The host never learns which experts were picked for a token."""
        from antefix_kernels import tokens

        stacks = self.experts
        side = Side(x_ND.device, 0)
        with side:
            shared = self.shared_experts(x_ND)
        experts_NK, weights_NK = self.gate(x_ND, tokens_N)
        with stacks.fetched():
            picks, num_routed, is_mine = _own_picks(stacks, experts_NK)
            rows, place = self._routed_rows(x_ND, picks, num_routed)
        if stacks.ranks is not None and is_mine is not None:
            # Each rank sorts its picks differently, so rows return to token order before they are merged.
            rows = stacks.ranks.merge(rows.index_select(0, place), is_mine)
            place = torch.arange(len(place), device=place.device)
        side.join()
        return tokens.combine(rows, place, weights_NK, shared)

    def _routed_rows(self, x_ND: Tensor, picks: Tensor, num_routed: int) -> tuple[Tensor, Tensor]:
        """The outputs of all picks, sorted by expert, and the row of each pick."""
        from antefix_kernels import linear as products
        from antefix_kernels import tokens

        stacks = self.experts
        gate_up_proj, down_proj = stacks.gate_up_proj, stacks.down_proj
        if isinstance(gate_up_proj, PackedStack):
            assert isinstance(down_proj, PackedStack)
            tile = gate_up_proj.card_tile(x_ND, picks.numel())
            routing = products.route(picks, num_routed, tile=tile)
            inner = gate_up_proj.card_product(x_ND, routing, gathered=True, gate_limit=stacks.limit)
            return down_proj.card_product(inner, routing, gathered=False), routing.place
        assert not isinstance(down_proj, PackedStack)
        routing = products.route(picks, num_routed)
        gate_up = products.multiply_routed(x_ND, gate_up_proj, routing, gathered=True)
        inner = tokens.swiglu(gate_up, stacks.limit)
        return products.multiply_routed(inner, down_proj, routing, gathered=False), routing.place


def takes_compiled(layer: MoE) -> bool:
    """Whether the layer's experts are plain matrices, all held by this process."""
    experts = layer.experts
    plain = not isinstance(experts.gate_up_proj, PackedStack) and isinstance(layer.shared_experts.gate_proj, nn.Linear)
    return plain and experts.ranks is None and experts.offload is None and layer.gate.scoring == "sqrtsoftplus"


def _own_picks(stacks: Experts, experts_NK: Tensor) -> tuple[Tensor, int, Tensor | None]:
    """Picks as indices into this rank's stacks, how many indices there are, and which picks are this rank's [N * K, 1].

    Picks of other ranks' experts get the index after the last expert; no product computes their rows.
    """
    if stacks.ranks is None:
        return experts_NK, stacks.num_experts, None
    first, stop = stacks.ranks.span(stacks.num_experts)
    is_mine = (experts_NK >= first) & (experts_NK < stop)
    return torch.where(is_mine, experts_NK - first, stop - first), stop - first + 1, is_mine.view(-1, 1)


def _row_sums(weights_NK: Tensor) -> Tensor:
    """Sums [N, 1]. On a GPU the picks are ordered column by column, because the order of a reduction depends there on
    the row count.
    """
    if not has_kernels(weights_NK):
        return weights_NK.sum(-1, keepdim=True)
    total = weights_NK[:, :1]
    for column in range(1, weights_NK.shape[1]):
        total = total + weights_NK[:, column : column + 1]
    return total


def expert_scores(logits_NE: Tensor, scoring: str) -> Tensor:
    if scoring == "sqrtsoftplus":
        return torch.sqrt(softplus(logits_NE))
    return sigmoid(logits_NE)


def pick_experts(scores_NE: Tensor, num_picked: int) -> Tensor:
    """The K best experts [N, K], ascending by id. Of experts with equal scores, the one with the lowest id wins,
    whatever else is in the batch.
    """
    ranked = scores_NE.sort(dim=-1, descending=True, stable=True).indices
    picked: Tensor = ranked[:, :num_picked].sort(-1).values
    return picked


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def clamped_swiglu(gate_up: Tensor, limit: float) -> Tensor:
    """silu(gate) * up for [..., 2I]; the gate is clamped from above, and up is clamped on both sides."""
    gate, up = gate_up.chunk(2, dim=-1)
    return silu(gate.clamp(max=limit)) * up.clamp(-limit, limit)
