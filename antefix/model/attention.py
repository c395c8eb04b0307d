"""V4's attention module: shared-KV multi-query attention with sinks and a grouped output projection.

This module holds the parameters and the computations that concern one token alone. Attention across tokens is computed
in `ops`.

Shapes:  N = tokens, D = hidden size, H = heads, C = head dim, Q = q rank, G = output groups.
Source:  V4 report, section 2.3.3; oracle: transformers' DeepseekV4Attention.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from antefix.layout import LayerKind
from antefix.model.compiled.switch import is_compiled
from antefix.model.compressor import Compressor
from antefix.model.indexer import Indexer
from antefix.model.joined_weights import NO_PRODUCTS, Products, joined_products, product_of
from antefix.model.model_config import ModelConfig
from antefix.model.norms_rope import RMSNorm, norm_rotate, rms_norm, rotate_back
from antefix.model.numerics import grouped_linear, linear
from antefix.model.ranks import Ranks


class CSACompressor(Compressor):
    """CSA's main compressor. The attention module holds the indexer too, as the checkpoints' tensor names do."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config, LayerKind.CSA, config.geometry.head_dim)
        self.indexer = Indexer(config)

    def input_modules(self) -> list[nn.Linear]:
        return [*super().input_modules(), *self.indexer.input_modules()]


class Attention(nn.Module):
    """One layer's attention parameters. `compressor` is None in window-only layers."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        geometry = config.geometry
        self.kind = geometry.layers[layer]
        self.num_heads, self.head_dim = config.num_heads, geometry.head_dim
        self.o_groups = config.o_groups
        heads_dim = config.num_heads * geometry.head_dim
        self.q_a_proj = nn.Linear(config.hidden_size, config.q_lora_rank, bias=False)
        self.q_a_norm = RMSNorm(config.q_lora_rank, config.rms_norm_eps)
        self.q_b_proj = nn.Linear(config.q_lora_rank, heads_dim, bias=False)
        self.kv_proj = nn.Linear(config.hidden_size, geometry.head_dim, bias=False)
        self.kv_norm = RMSNorm(geometry.head_dim, config.rms_norm_eps)
        self.o_a_proj = nn.Linear(heads_dim // config.o_groups, config.o_groups * config.o_lora_rank, bias=False)
        self.o_b_proj = nn.Linear(config.o_groups * config.o_lora_rank, config.hidden_size, bias=False)
        self.sinks = nn.Parameter(torch.empty(config.num_heads))
        self.eps = config.rms_norm_eps
        # Set where the heads are split over ranks.
        self.ranks: Ranks | None = None
        self.compressor: Compressor | None = None
        if self.kind is LayerKind.CSA:
            self.compressor = CSACompressor(config)
        elif self.kind is LayerKind.HCA:
            self.compressor = Compressor(config, LayerKind.HCA, geometry.head_dim)

    def input_products(self, x_ND: Tensor) -> Products:
        """The products of the block's input with each weight that takes it, as far as a GPU computes them together. The
        methods below compute the products that they are not given.
        """
        modules: list[nn.Linear] = [self.q_a_proj, self.kv_proj]
        if self.compressor is not None:
            modules += self.compressor.input_modules()
        return joined_products(x_ND, modules)

    def query_residual(self, x_ND: Tensor, done: Products = NO_PRODUCTS) -> Tensor:
        """The low-rank query [N, Q] that attention's and the indexer's heads share."""
        return rms_norm(product_of(x_ND, self.q_a_proj, done), self.q_a_norm.weight, self.eps)

    def queries(self, q_residual_NQ: Tensor, cos: Tensor, sin: Tensor, *, halves: bool = False) -> Tensor:
        """Normed, rotated queries [N, H, C], already scaled by C^-1/2 for the dot products with keys.

        halves: as float16, after rounding to the model's type.
        """
        q = linear(q_residual_NQ, self.q_b_proj.weight).view(-1, self.num_heads, self.head_dim)
        scale = math.pow(self.head_dim, -0.5)
        return norm_rotate(q, None, self.eps, cos.unsqueeze(1), sin.unsqueeze(1), scale=scale, halves=halves)

    def window_entries(self, x_ND: Tensor, cos: Tensor, sin: Tensor, done: Products = NO_PRODUCTS) -> Tensor:
        """Window KV [N, C] before rounding; each entry is both key and value."""
        return norm_rotate(product_of(x_ND, self.kv_proj, done), self.kv_norm.weight, self.eps, cos, sin)

    def output(self, attended_NHC: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotate the attended values back by the query's position, then project them to [N, D]."""
        if is_compiled(attended_NHC) and self.ranks is None:
            from antefix.model.compiled import tokens

            return linear(tokens.grouped_back(self, attended_NHC, cos, sin), self.o_b_proj.weight)
        turned_back = rotate_back(attended_NHC, cos.unsqueeze(1), sin.unsqueeze(1))
        grouped = turned_back.reshape(len(turned_back), self.o_groups, -1)
        low = grouped_linear(grouped, self.o_a_proj.weight).flatten(1)
        return linear(low if self.ranks is None else self.ranks.gather(low), self.o_b_proj.weight)
