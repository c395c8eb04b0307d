"""A layer's feed-forward part on a CPU: `moe.MoE.forward` with everything except the products compiled.

The shared expert's rows and those of the routed experts (sorted by expert and padded to whole tiles) lie in one
buffer, so that one call computes the activation of all of them.

Shapes:  N = tokens, padded to ROW_TILE; n = tokens; D = hidden size, E = experts, K = experts per token, I = inner,
         R = rows of all experts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from antefix.model.compiled import expert_kernels as kernels
from antefix.model.compiled.tokens import lanes
from antefix.model.numerics import ROW_TILE, ROWS_FEW, linear, linear_into, matrices_of, softplus

if TYPE_CHECKING:
    from antefix.model.moe import ExpertRouter, MoE


def run(layer: MoE, x_ND: Tensor, tokens_n: Tensor) -> Tensor:
    """x_ND may have padding rows behind the tokens' rows. The output has the same padding rows; their values mean
    nothing.
    """
    num_tokens, (num_rows, size) = tokens_n.shape[0], x_ND.shape
    experts, weights = _pick(layer.gate, x_ND, tokens_n)
    gate_up_stack, down_stack = layer.experts.gate_up_proj, layer.experts.down_proj
    assert isinstance(gate_up_stack, Tensor) and isinstance(down_stack, Tensor)
    num_experts, num_picked = layer.experts.num_experts, experts.shape[1]
    shared, inner = layer.shared_experts, layer.shared_experts.gate_proj.out_features
    # 1. Rows of the picked experts, in runs of whole tiles. For few tokens the runs are not padded.
    tile = 1 if num_tokens <= ROWS_FEW else ROW_TILE
    rows_max = num_tokens * num_picked + min(num_experts, num_tokens * num_picked) * (tile - 1)
    rows = x_ND.new_empty(rows_max, size)
    places, counts = torch.empty_like(experts), np.empty(num_experts, np.int64)
    kernels.spread(
        rows.data_ptr(), places.data_ptr(), counts.ctypes.data, x_ND.data_ptr(), experts.data_ptr(),
        num_tokens, num_experts, num_picked, size, tile,
    )  # fmt: skip
    runs, stop = [], 0
    for expert, count in enumerate(counts.tolist()):
        if count:
            runs.append((expert, slice(stop, stop + count), slice(num_rows + stop, num_rows + stop + count)))
            stop += count
    # 2. Gate and up products of all rows, then one activation for all.
    gate_up = x_ND.new_empty(num_rows + stop, 2 * inner)
    linear_into(x_ND, shared.gate_proj.weight, gate_up[:num_rows, :inner])
    linear_into(x_ND, shared.up_proj.weight, gate_up[:num_rows, inner:])
    matrices = matrices_of(gate_up_stack, num_experts)
    for expert, part, place in runs:
        linear_into(rows[part], matrices[expert], gate_up[place])
    active = x_ND.new_empty(gate_up.shape[0], inner)
    kernels.gates(active.data_ptr(), gate_up.data_ptr(), gate_up.shape[0], inner, shared.limit)
    active.exp_()
    kernels.activate(active.data_ptr(), gate_up.data_ptr(), gate_up.shape[0], inner, shared.limit)
    # 3. Down products, and each token's weighted sum.
    out = x_ND.new_empty(num_rows, size)
    linear_into(active[:num_rows], shared.down_proj.weight, out)
    matrices = matrices_of(down_stack, num_experts)
    for expert, part, place in runs:
        linear_into(active[place], matrices[expert], rows[part])
    kernels.combine(
        out.data_ptr(), rows.data_ptr(), places.data_ptr(), weights.data_ptr(), num_tokens, num_picked, size
    )
    return out


def _pick(router: ExpertRouter, x_ND: Tensor, tokens_n: Tensor) -> tuple[Tensor, Tensor]:
    """`ExpertRouter.forward`: experts [n, K] and their weights."""
    num, (num_experts, _) = tokens_n.shape[0], router.weight.shape
    # torch's square root of floats is not always the nearest float, so torch computes it here as well.
    scores = torch.sqrt_(softplus(linear(x_ND, router.weight)[:num])).contiguous()
    experts = torch.empty((num, router.num_picked), dtype=torch.long)
    weights = scores.new_empty(num, router.num_picked)
    bias = 0 if router.hash_routed else router.e_score_correction_bias.data_ptr()
    table = router.tid2eid.data_ptr() if router.hash_routed else 0
    tokens = tokens_n.contiguous()
    kernels.pick(
        experts.data_ptr(), weights.data_ptr(), scores.data_ptr(), bias, table, tokens.data_ptr(),
        num, num_experts, router.num_picked, lanes(), router.scaling,
    )  # fmt: skip
    return experts, weights
