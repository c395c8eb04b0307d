"""Tensor names: checkpoints spell them as DeepSeek released them, modules as transformers does. Both are accepted.

transformers' save_pretrained turns module names back into the released spelling (under a `model.` prefix), with each
expert's matrices apart; that is what `checkpoint_name` and `split_experts` write too, so either side loads the other's.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_INDEXER = "self_attn.compressor.indexer"
# Released spelling -> module name, inside a layer.
_LAYER_NAMES = {
    "attn_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "hc_attn_fn": "attn_hc.fn",
    "hc_attn_base": "attn_hc.base",
    "hc_attn_scale": "attn_hc.scale",
    "hc_ffn_fn": "ffn_hc.fn",
    "hc_ffn_base": "ffn_hc.base",
    "hc_ffn_scale": "ffn_hc.scale",
    "attn.attn_sink": "self_attn.sinks",
    "attn.norm.weight": "self_attn.kv_norm.weight",
    "attn.kv_norm.weight": "self_attn.kv_norm.weight",
    "attn.q_norm.weight": "self_attn.q_a_norm.weight",
    "attn.wkv.weight": "self_attn.kv_proj.weight",
    "attn.wq_a.weight": "self_attn.q_a_proj.weight",
    "attn.wq_b.weight": "self_attn.q_b_proj.weight",
    "attn.wo_a.weight": "self_attn.o_a_proj.weight",
    "attn.wo_b.weight": "self_attn.o_b_proj.weight",
    "attn.compressor.ape": "self_attn.compressor.position_bias",
    "attn.compressor.norm.weight": "self_attn.compressor.kv_norm.weight",
    "attn.compressor.wkv.weight": "self_attn.compressor.kv_proj.weight",
    "attn.compressor.wgate.weight": "self_attn.compressor.gate_proj.weight",
    "attn.indexer.compressor.ape": f"{_INDEXER}.position_bias",
    "attn.indexer.compressor.norm.weight": f"{_INDEXER}.kv_norm.weight",
    "attn.indexer.compressor.wkv.weight": f"{_INDEXER}.kv_proj.weight",
    "attn.indexer.compressor.wgate.weight": f"{_INDEXER}.gate_proj.weight",
    "attn.indexer.weights_proj.weight": f"{_INDEXER}.scorer.weights_proj.weight",
    "attn.indexer.wq_b.weight": f"{_INDEXER}.q_b_proj.weight",
    "ffn.gate.weight": "mlp.gate.weight",
    "ffn.gate.bias": "mlp.gate.e_score_correction_bias",
    "ffn.gate.tid2eid": "mlp.gate.tid2eid",
    "ffn.shared_experts.w1.weight": "mlp.shared_experts.gate_proj.weight",
    "ffn.shared_experts.w2.weight": "mlp.shared_experts.down_proj.weight",
    "ffn.shared_experts.w3.weight": "mlp.shared_experts.up_proj.weight",
}
_TOP_NAMES = {
    "embed.weight": "model.embed_tokens.weight",
    "head.weight": "lm_head.weight",
    "hc_head_fn": "model.hc_head.hc_fn",
    "hc_head_base": "model.hc_head.hc_base",
    "hc_head_scale": "model.hc_head.hc_scale",
}
_LAYER = re.compile(r"^(?:model\.)?layers\.(\d+)\.(.+)$")
_EXPERT = re.compile(r"^ffn\.experts\.(\d+)\.w([123])\.weight$")
# Multi-token prediction layers come with released checkpoints and are not run here.
_IGNORED = re.compile(r"(^|\.)mtp\.")
_TO_RELEASED = {module: released for released, module in _LAYER_NAMES.items() if released != "attn.kv_norm.weight"}


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorTarget:
    """Where a checkpoint's tensor goes: a module's tensor, or one expert's part (1 gate, 2 down, 3 up) of it."""

    name: str
    expert: int | None = None
    part: int = 0


def target_of(name: str) -> TensorTarget | None:
    """The place of a checkpoint's tensor; None for tensors that are not part of the model that is run."""
    if _IGNORED.search(name):
        return None
    if name in _TOP_NAMES:
        return TensorTarget(name=_TOP_NAMES[name])
    match = _LAYER.match(name)
    if match is None:
        return TensorTarget(name=name if name.startswith(("model.", "lm_head.")) else f"model.{name}")
    prefix, rest = f"model.layers.{match[1]}.", match[2]
    if expert := _EXPERT.match(rest):
        stacked = "down_proj" if expert[2] == "2" else "gate_up_proj"
        return TensorTarget(name=f"{prefix}mlp.experts.{stacked}", expert=int(expert[1]), part=int(expert[2]))
    return TensorTarget(name=prefix + _LAYER_NAMES.get(rest, rest))


def checkpoint_name(name: str) -> str:
    """The spelling that transformers saves a module's tensor under (expert stacks excepted)."""
    if name == "lm_head.weight":
        return "head.weight"
    match = _LAYER.match(name)
    if match is None or match[2] not in _TO_RELEASED:
        return name
    return f"model.layers.{match[1]}.{_TO_RELEASED[match[2]]}"


def expert_name(name: str, expert: int, part: int) -> str:
    """The spelling of one expert's part of the stack `name` (`...mlp.experts.gate_up_proj` or `.down_proj`)."""
    return f"{name.rsplit('.mlp.', 1)[0]}.ffn.experts.{expert}.w{part}.weight"
