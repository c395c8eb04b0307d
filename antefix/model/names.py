"""Tensor names: checkpoints use the names that DeepSeek released, modules those of transformers. Both are accepted.

transformers' save_pretrained writes the released names (under a `model.` prefix), with each expert's matrices as
separate tensors. `checkpoint_name` and `split_experts` use the same names, so Antefix and transformers can load what
the other saves.

A packed weight's scales are stored under their own name: `X.scale` in the releases, `X.weight_scale_inv` by
transformers. Releases also hold draft modules: `mtp.0.*`, one layer that predicts one token further ahead, or in later
releases `mtp.0.*` to `mtp.2.*` of DSpark. The loader knows all names of tensors in these draft modules. Any other name
is refused, also under `mtp.`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

_INDEXER = "self_attn.compressor.indexer"
# Released name -> module name, inside a layer.
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
# Tensors that a draft module has in addition to a layer's tensors.
_MTP_NAMES = {
    "e_proj.weight": "e_proj.weight",
    "h_proj.weight": "h_proj.weight",
    "enorm.weight": "enorm.weight",
    "hnorm.weight": "hnorm.weight",
    "norm.weight": "norm.weight",
    "hc_head_fn": "hc_head.hc_fn",
    "hc_head_base": "hc_head.hc_base",
    "hc_head_scale": "hc_head.hc_scale",
}
# DSpark's own tensors, and the copies of embedding and head that some releases carry. None of them is run here.
_DSPARK_NAMES = {
    "main_proj.weight", "main_norm.weight", "markov_head.markov_w1.weight", "markov_head.markov_w2.weight",
    "confidence_head.proj.weight", "confidence_head.proj.bias", "emb.tok_emb.weight", "head.weight",
}  # fmt: skip
_LAYER = re.compile(r"^(?:model\.)?layers\.(\d+)\.(.+)$")
_EXPERT = re.compile(r"^ffn\.experts\.(\d+)\.w([123])\.weight$")
_MTP = re.compile(r"^(?:model\.)?mtp\.(\d+)\.(.+)$")
_TO_RELEASED = {module: released for released, module in _LAYER_NAMES.items() if released != "attn.kv_norm.weight"}


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorTarget:
    """Where a checkpoint's tensor goes: into a module's tensor, or into one expert's part of it (1 gate, 2 down, 3 up).

    is_scale: the tensor holds the scales of that module's tensor. is_draft: the tensor belongs to a draft module.
    """

    name: str
    expert: int | None = None
    part: int = 0
    is_scale: bool = False
    is_draft: bool = False


def target_of(name: str) -> TensorTarget:
    """Where a tensor of a checkpoint belongs in a model. For an unknown name, the returned place is one that no model
    has.
    """
    base, is_scale = _without_scale(name)
    if base in _TOP_NAMES:
        return TensorTarget(name=_TOP_NAMES[base], is_scale=is_scale)
    if match := _MTP.match(base):
        place = _in_layer(f"mtp.{match[1]}.", match[2])
        if match[2] in _MTP_NAMES:
            place = TensorTarget(name=f"mtp.{match[1]}.{_MTP_NAMES[match[2]]}")
        return replace(place, is_scale=is_scale, is_draft=True)
    if match := _LAYER.match(base):
        return replace(_in_layer(f"model.layers.{match[1]}.", match[2]), is_scale=is_scale)
    name = base if base.startswith(("model.", "lm_head.")) else f"model.{base}"
    return TensorTarget(name=name, is_scale=is_scale)


def is_known_draft(name: str) -> bool:
    """Whether draft modules of V4 releases have a tensor of this name."""
    base, _ = _without_scale(name)
    match = _MTP.match(base)
    if match is None:
        return False
    rest = match[2]
    is_compressor = "compressor" in rest or "indexer" in rest
    in_layer = (rest in _LAYER_NAMES and not is_compressor) or _EXPERT.match(rest) is not None
    return in_layer or rest in _MTP_NAMES or rest in _DSPARK_NAMES


def _without_scale(name: str) -> tuple[str, bool]:
    """The name of a weight, and whether `name` was the name of the weight's scales."""
    if name.endswith(".weight_scale_inv"):
        return name.removesuffix("_scale_inv"), True
    # `attn_hc.scale` is the module's name for the scale parameter of a hyper-connection.
    if name.endswith(".scale") and not name.endswith("_hc.scale"):
        return f"{name.removesuffix('scale')}weight", True
    return name, False


def _in_layer(prefix: str, rest: str) -> TensorTarget:
    if expert := _EXPERT.match(rest):
        stacked = "down_proj" if expert[2] == "2" else "gate_up_proj"
        return TensorTarget(name=f"{prefix}mlp.experts.{stacked}", expert=int(expert[1]), part=int(expert[2]))
    return TensorTarget(name=prefix + _LAYER_NAMES.get(rest, rest))


def checkpoint_name(name: str) -> str:
    """The name under which transformers saves a module's tensor (except stacks of experts)."""
    if name == "lm_head.weight":
        return "head.weight"
    if match := _MTP.match(name):
        released = {module: of_release for of_release, module in _MTP_NAMES.items()} | _TO_RELEASED
        return f"mtp.{match[1]}.{released.get(match[2], match[2])}"
    match = _LAYER.match(name)
    if match is None or match[2] not in _TO_RELEASED:
        return name
    return f"model.layers.{match[1]}.{_TO_RELEASED[match[2]]}"


def expert_name(name: str, expert: int, part: int) -> str:
    """The name of one expert's part of the stack `name` (`...mlp.experts.gate_up_proj` or `.down_proj`)."""
    return f"{name.rsplit('.mlp.', 1)[0]}.ffn.experts.{expert}.w{part}.weight"
