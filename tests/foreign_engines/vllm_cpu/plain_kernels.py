"""vLLM's V4 kernels for CPUs in plain PyTorch, for processors without AVX512-BF16, for which its wheel has none.

A part of the test shim. The kernels follow vLLM's Triton kernels for V4 (models/deepseek_v4/common/ops): they write the
same entries of 584 bytes at the same places of its cache, with sums in another order. A processor for which vLLM has
kernels runs those instead.

Shapes:  T = tokens, H = heads, D = head_dim (512, indexer 128), S = entries that a token attends to.
A cache is [blocks, bytes]: 576 (128) bytes of each entry of a block, then 8 (4) bytes of scale of each.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

NAMESPACE = "_C"
FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
NOPE, ROPE = 448, 64
# The number of tokens that attend at a time. A whole chunk at once would take gigabytes.
TOKENS_AT_ONCE = 64


def register() -> list[str]:
    """Define the kernels that are missing. Returns their names."""
    missing = [name for name in KERNELS if not hasattr(torch.ops._C, name)]
    for name in missing:
        kernel, changed = KERNELS[name]
        _LIBRARY.define(name + torch.library.infer_schema(kernel, mutates_args=changed))
        _LIBRARY.impl(name, kernel, "CPU")
    return missing


_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")


# --- entries ---------------------------------------------------------------------------------------------------------


def _rotated(x: Tensor, positions: Tensor, cos_sin: Tensor, *, back: bool = False) -> Tensor:
    """x in float32, with neighbouring pairs of its last ROPE numbers rotated by their position."""
    cos, sin = (part for part in cos_sin[positions].float().chunk(2, -1))
    while cos.dim() < x.dim():
        cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    sin = -sin if back else sin
    even, odd = x[..., -ROPE::2].float(), x[..., -ROPE + 1 :: 2].float()
    turned = torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1).flatten(-2)
    return torch.cat((x[..., :-ROPE].float(), turned), -1)


def _codes(x: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """FP8 codes, and the exponent of the power of two that scales each `width` numbers."""
    parts = x.to(torch.bfloat16).float().unflatten(-1, (-1, width))
    exponents = (parts.abs().amax(-1).clamp_min(1e-4) * (1 / FP8_MAX)).log2().ceil()
    codes = (parts * torch.exp2(-exponents).unsqueeze(-1)).clamp(-FP8_MAX, FP8_MAX).to(FP8)
    return codes.view(torch.uint8).flatten(-2), exponents


def _write(cache: Tensor, slots: Tensor, block: int, data: Tensor, scales: Tensor) -> None:
    """Put entries into their slots. An entry with a negative slot is skipped."""
    is_real = slots >= 0
    slots, data, scales = slots[is_real].long(), data[is_real], scales[is_real]
    number, place = (slots // block).unsqueeze(1), (slots % block).unsqueeze(1)
    cache[number, place * data.shape[1] + torch.arange(data.shape[1])] = data
    behind = block * data.shape[1] + place * scales.shape[1]
    cache[number, behind + torch.arange(scales.shape[1])] = scales


def _write_entries(cache: Tensor, slots: Tensor, block: int, plain: Tensor, rotated: Tensor) -> None:
    """plain: entries before rotation; their first NOPE numbers are stored in FP8.  rotated: their last ROPE in BF16."""
    codes, exponents = _codes(plain[:, :NOPE], 64)
    rope = rotated[:, NOPE:].to(torch.bfloat16).contiguous().view(torch.uint8)
    scales = F.pad((exponents + 127).clamp(0, 255).to(torch.uint8), (0, 1))
    _write(cache, slots, block, torch.cat((codes, rope), 1), scales)


def _read_entries(cache: Tensor, slots: Tensor, block: int) -> Tensor:
    """Entries [..., 512] in float32. An entry with a negative slot may hold any values."""
    safe = slots.clamp_min(0).long()
    number, place = (safe // block).unsqueeze(-1), (safe % block).unsqueeze(-1)
    data = cache[number, place * 576 + torch.arange(576)]
    scales = cache[number, block * 576 + place * 8 + torch.arange(7)]
    nope = data[..., :NOPE].contiguous().view(FP8).float().unflatten(-1, (7, 64))
    nope = (nope * torch.exp2(scales.float() - 127).unsqueeze(-1)).flatten(-2)
    return torch.cat((nope, data[..., NOPE:].contiguous().view(torch.bfloat16).float()), -1)


# --- the compressor --------------------------------------------------------------------------------------------------


def save_partial_states(
    kv: Tensor, score: Tensor, ape: Tensor, positions: Tensor, state_cache: Tensor, slot_mapping: Tensor
) -> None:
    number = slot_mapping.shape[0]
    is_real = slot_mapping >= 0
    slots, at = slot_mapping[is_real].long(), positions[:number][is_real] % ape.shape[0]
    states = torch.cat((kv[:number][is_real], score[:number][is_real] + ape[at]), 1).to(state_cache.dtype)
    block = state_cache.shape[1]
    state_cache[slots // block, slots % block] = states


def _compressed(state_cache: Tensor, gather_slots: Tensor, weight: Tensor, eps: float, compress_ratio: int) -> Tensor:
    """Groups [M, D] in float32, normed, from the slots [M, tokens] of their tokens."""
    width, block, safe = weight.numel(), state_cache.shape[1], gather_slots.clamp_min(0)
    states = state_cache[safe // block, safe % block].float()
    kv, score = states.chunk(2, -1)
    if gather_slots.shape[1] > compress_ratio:
        # The previous group is read in its first series, and the group itself in its second series.
        kv, score = (
            torch.cat((each[:, :compress_ratio, :width], each[:, compress_ratio:, width:]), 1) for each in (kv, score)
        )
    score = score.masked_fill((gather_slots < 0).unsqueeze(-1), float("-inf"))
    summed = (kv.masked_fill((gather_slots < 0).unsqueeze(-1), 0.0) * score.softmax(1)).sum(1)
    return summed * torch.rsqrt(summed.square().mean(-1, keepdim=True) + eps) * weight


def _groups(
    state_cache: Tensor, gather_slots: Tensor, positions: Tensor, slots: Tensor, weight: Tensor, eps: float, ratio: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The groups that end with one of these tokens, and their positions and slots."""
    at = positions[: gather_slots.shape[0]]
    slots = slots[: gather_slots.shape[0]]
    ends = ((at + 1) % ratio == 0) & (slots >= 0)
    groups = _compressed(state_cache, gather_slots[ends], weight, eps, ratio)
    return groups, at[ends] // ratio * ratio, slots[ends]


def compress_norm_rope_store(
    state_cache: Tensor,
    gather_slots: Tensor,
    positions: Tensor,
    kv_slot_mapping: Tensor,
    rms_norm_weight: Tensor,
    rms_norm_eps: float,
    cos_sin_cache: Tensor,
    kv_cache_2d: Tensor,
    kv_cache_block_size: int,
    compress_ratio: int,
) -> None:
    groups, at, slots = _groups(
        state_cache, gather_slots, positions, kv_slot_mapping, rms_norm_weight, rms_norm_eps, compress_ratio
    )
    _write_entries(kv_cache_2d, slots, kv_cache_block_size, groups, _rotated(groups, at, cos_sin_cache))


def compress_norm_rope_store_indexer(
    state_cache: Tensor,
    gather_slots: Tensor,
    positions: Tensor,
    kv_slot_mapping: Tensor,
    rms_norm_weight: Tensor,
    rms_norm_eps: float,
    cos_sin_cache: Tensor,
    kv_cache_2d: Tensor,
    kv_cache_block_size: int,
    compress_ratio: int,
) -> None:
    groups, at, slots = _groups(
        state_cache, gather_slots, positions, kv_slot_mapping, rms_norm_weight, rms_norm_eps, compress_ratio
    )
    codes, exponents = _codes(_rotated(groups, at, cos_sin_cache), 128)
    scales = torch.exp2(exponents).float().contiguous().view(torch.uint8)
    _write(kv_cache_2d, slots, kv_cache_block_size, codes, scales)


# --- attention -------------------------------------------------------------------------------------------------------


def fused_qnorm_rope_kv_insert(
    q: Tensor,
    kv: Tensor,
    positions: Tensor,
    swa_kv_cache_2d: Tensor,
    slot_mapping: Tensor,
    cos_sin_cache: Tensor,
    q_head_padded: int,
    eps: float,
    cache_block_size: int,
) -> Tensor:
    normed = q.float() * torch.rsqrt(q.float().square().mean(-1, keepdim=True) + eps)
    turned = _rotated(normed, positions[: q.shape[0]], cos_sin_cache).to(q.dtype)
    number = slot_mapping.shape[0]
    plain = kv[:number].float()
    _write_entries(
        swa_kv_cache_2d, slot_mapping, cache_block_size, plain, _rotated(plain, positions[:number], cos_sin_cache)
    )
    return F.pad(turned, (0, 0, 0, q_head_padded - q.shape[1]))


def flash_mla_with_kvcache(
    out: Tensor,
    q: Tensor,
    window_cache_2d: Tensor,
    window_slots: Tensor,
    window_block_size: int,
    compressed_cache_2d: Tensor,
    compressed_slots: Tensor,
    compressed_block_size: int,
    attn_sink: Tensor,
    scale: float,
) -> None:
    sink = attn_sink.float()[: q.shape[1]].view(1, -1, 1)
    for first in range(0, q.shape[0], TOKENS_AT_ONCE):
        some = slice(first, first + TOKENS_AT_ONCE)
        slots = torch.cat((window_slots[some], compressed_slots[some]), 1)
        entries = torch.cat(
            (
                _read_entries(window_cache_2d, window_slots[some], window_block_size),
                _read_entries(compressed_cache_2d, compressed_slots[some], compressed_block_size),
            ),
            1,
        )
        # A negative slot's entry may hold anything, including NaN.
        entries = entries.masked_fill((slots < 0).unsqueeze(-1), 0.0)
        logits = (q[some].float() @ entries.transpose(1, 2)) * scale
        logits = logits.masked_fill((slots < 0).unsqueeze(1), float("-inf"))
        shares = torch.cat((logits, sink.expand(len(logits), -1, 1)), -1).softmax(-1)[..., :-1]
        out[some] = (shares @ entries).to(out.dtype)


def inverse_gptj_rope_o_proj(o: Tensor, positions: Tensor, cos_sin_cache: Tensor, rope_dim: int) -> Tensor:
    return _rotated(o, positions[: o.shape[0]], cos_sin_cache, back=True)


def bmm(out: Tensor, mat1: Tensor, mat2: Tensor, is_vnni: bool, scale: Tensor | None) -> None:
    product = torch.bmm(mat1.float(), mat2.float().transpose(1, 2))
    out.copy_(product if scale is None else product * scale)


def convert_weight_packed(weight: Tensor) -> Tensor:
    return weight.clone()


# --- experts ---------------------------------------------------------------------------------------------------------


def _weights_of(scores: Tensor, ids: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    chosen = scores.gather(1, ids.long())
    return (chosen / chosen.sum(-1, keepdim=True) * factor).contiguous(), ids.to(torch.int32).contiguous()


def biased_topk(
    hidden_states: Tensor,
    gating_output: Tensor,
    correction_bias: Tensor,
    topk: int,
    renormalize: bool,
    scoring_func: str,
    num_fused_shared_experts: int,
    routed_scaling_factor: float | None,
    apply_routed_scaling_factor_on_output: bool,
) -> tuple[Tensor, Tensor]:
    scores = F.softplus(gating_output.float()).sqrt()
    return _weights_of(scores, (scores + correction_bias.float()).topk(topk, -1).indices, routed_scaling_factor or 1.0)


def hash_topk(
    gating_output: Tensor,
    tid2eid: Tensor,
    topk: int,
    scoring_func: str,
    num_fused_shared_experts: int,
    num_experts: int,
    routed_scaling_factor: float,
) -> tuple[Tensor, Tensor]:
    return _weights_of(F.softplus(gating_output.float()).sqrt(), tid2eid, routed_scaling_factor)


# --- hyper-connections -----------------------------------------------------------------------------------------------


def hc_pre_fused(
    x: Tensor,
    hc_fn: Tensor,
    hc_scale: Tensor,
    hc_base: Tensor,
    hc_mult: int,
    sinkhorn_iters: int,
    rms_eps: float,
    hc_eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    from vllm.model_executor.kernels.mhc.torch import mhc_pre_torch

    post, comb, y = mhc_pre_torch(
        x.contiguous(), hc_fn, hc_scale, hc_base, rms_eps, hc_eps, hc_eps, 2.0, sinkhorn_iters
    )
    return y, post.squeeze(-1), comb


def hc_post_fused(x: Tensor, residual: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    from vllm.model_executor.kernels.mhc.torch import mhc_post_torch

    return mhc_post_torch(x, residual, post.unsqueeze(-1), comb)


def hc_head_fused(
    x: Tensor, hc_fn: Tensor, hc_scale: Tensor, hc_base: Tensor, hc_eps: float, norm_eps: float
) -> Tensor:
    flat = x.flatten(1).float()
    mixes = (flat @ hc_fn.float().t()) * torch.rsqrt(flat.square().mean(-1, keepdim=True) + norm_eps)
    shares = torch.sigmoid(mixes * hc_scale + hc_base) + hc_eps
    return (shares.unsqueeze(-1) * x.float()).sum(1).to(x.dtype)


# Kernels by vLLM's names, with the arguments that each writes to.
KERNELS = {
    "save_partial_states_cpu": (save_partial_states, ["state_cache"]),
    "compress_norm_rope_store_cpu": (compress_norm_rope_store, ["kv_cache_2d"]),
    "compress_norm_rope_store_indexer_cpu": (compress_norm_rope_store_indexer, ["kv_cache_2d"]),
    "fused_qnorm_rope_kv_insert_cpu": (fused_qnorm_rope_kv_insert, ["swa_kv_cache_2d"]),
    "flash_mla_with_kvcache_cpu": (flash_mla_with_kvcache, ["out"]),
    "inverse_gptj_rope_o_proj_cpu": (inverse_gptj_rope_o_proj, []),
    "bmm_cpu": (bmm, ["out"]),
    "convert_weight_packed": (convert_weight_packed, []),
    "biased_topk_cpu": (biased_topk, []),
    "hash_topk_cpu": (hash_topk, []),
    "hc_pre_fused_cpu": (hc_pre_fused, []),
    "hc_post_fused_cpu": (hc_post_fused, []),
    "hc_head_fused_cpu": (hc_head_fused, []),
}
