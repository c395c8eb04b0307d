"""The model: parameters under transformers' names, and the layers' order. The forward pass for serving is in `runner`.

Shapes:  V = vocabulary, D = hidden size, M = streams.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from antefix.layout import BlockLayout, KVFormat, LayerKind
from antefix.model.attention import Attention
from antefix.model.mhc import HyperConnection, HyperHead
from antefix.model.model_config import ModelConfig
from antefix.model.moe import MoE
from antefix.model.norms_rope import RMSNorm, inverse_frequencies, rope_table

if TYPE_CHECKING:
    from antefix.model.expert_offload import ExpertOffload
    from antefix.model.lead import Lead
    from antefix.model.ranks import Ranks


class DecoderLayer(nn.Module):
    """Parameters of one layer."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = MoE(config, layer)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attn_hc = HyperConnection(config)
        self.ffn_hc = HyperConnection(config)


class DraftLayer(DecoderLayer):
    """Parameters of the layer that predicts one token further ahead, `mtp.0` in checkpoints. The draft layer is
    window-only and never hash-routed. The draft layer's output head is a mixing and a norm of its own, then the main
    model's `lm_head`.
    """

    def __init__(self, config: ModelConfig) -> None:
        geometry = replace(config.geometry, layers=(LayerKind.WINDOW,))
        super().__init__(replace(config, geometry=geometry, hash_routed=(False,)), 0)
        self.e_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.h_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.enorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hnorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hc_head = HyperHead(config)


class Trunk(nn.Module):
    """The whole model except the output head; checkpoints call this part `model`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        # Not `nn.Embedding(...)`: on the meta device, which loading uses, it would import PyTorch's compiler to
        # initialise the table, and that takes seconds.
        table = torch.empty(config.vocab_size, config.hidden_size)
        self.embed_tokens: nn.Embedding = nn.Embedding.from_pretrained(table, freeze=False)
        self.layers = nn.ModuleList(DecoderLayer(config, layer) for layer in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hc_head = HyperHead(config)


class Model(nn.Module):
    """A DeepSeek-V4 model. `layout` describes its KV records. `mtp` is the draft layer, if one was loaded.

    The weights of a model that was not loaded from a checkpoint are uninitialised until `init_weights`.
    """

    rope_main: Tensor
    rope_compress: Tensor

    def __init__(self, config: ModelConfig, *, kv_format: KVFormat = KVFormat.FP8, drafts: bool = False) -> None:
        super().__init__()
        self.config = config
        self.layout = BlockLayout(geometry=config.geometry, kv_format=kv_format)
        self.model = Trunk(config)
        self.mtp = nn.ModuleList([DraftLayer(config)] if drafts else [])
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        rope_dim = config.geometry.rope_dim
        # With several ranks: `ranks` is this rank's place. On rank 0, `lead` sends each call to the other ranks.
        self.ranks: Ranks | None = None
        self.lead: Lead | None = None
        # Whether a step may use fewer threads than torch has: true if the probe saw no bits depend on their number.
        self.threads_are_free = False
        # Set if the experts of some layers are in host memory.
        self.offload: ExpertOffload | None = None
        self.register_buffer("rope_main", inverse_frequencies(config.rope_main, rope_dim), persistent=False)
        self.register_buffer("rope_compress", inverse_frequencies(config.rope_compress, rope_dim), persistent=False)

    @property
    def device(self) -> torch.device:
        return self.model.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.embed_tokens.weight.dtype

    def rope(self, kind: LayerKind, positions_N: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [N, R / 2]: the main RoPE for window-only layers, the compressed branches' RoPE for others."""
        if kind is LayerKind.WINDOW:
            return rope_table(positions_N, self.rope_main, self.config.rope_main.attention_factor, self.dtype)
        return rope_table(positions_N, self.rope_compress, self.config.rope_compress.attention_factor, self.dtype)


@torch.no_grad()
def init_weights(model: Model, *, seed: int = 0) -> Model:
    """Fill every parameter and table from a seed, to start a training or to make a model for tests.

    Hash tables spread tokens evenly over experts. Sinks, biases and mixing weights are small but not zero.
    """
    generator = torch.Generator(device="cpu").manual_seed(seed)

    def normal(shape: torch.Size, std: float) -> Tensor:
        return torch.randn(shape, generator=generator) * std

    std = model.config.initializer_range
    for name, tensor in model.named_parameters():
        if name.endswith("norm.weight"):
            tensor.copy_(1 + normal(tensor.shape, std))
        elif name.endswith("scale"):
            tensor.fill_(1.0)
        else:
            tensor.copy_(normal(tensor.shape, std))
    num_experts, num_picked = model.config.num_experts, model.config.num_experts_per_token
    for name, table in model.named_buffers():
        if name.endswith("tid2eid"):
            ranks = torch.rand(len(table), num_experts, generator=generator).argsort(-1)
            table.copy_(ranks[:, :num_picked])
    return model
