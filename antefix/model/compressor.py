"""Compressors pool each group of tokens into one entry. The groups of HCA are disjoint, those of CSA overlap.

CSA's projections give two series per token, Ca then Cb. Group w pools the Ca rows of group w-1 and its own Cb rows. So
the Ca rows of the last complete group (the overlap state) are kept until the next group is complete.

Shapes:  N = tokens, G = groups, m = ratio, C = entry width (head dim, or indexer dim), S = C or, for CSA, 2C.
Source:  V4 report, sections 2.3.1 and 2.3.2; oracle: transformers' DeepseekV4CSACompressor, DeepseekV4HCACompressor.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from antefix.layout import LayerKind
from antefix.model.compiled.switch import is_compiled
from antefix.model.joined_weights import NO_PRODUCTS, Products, product_of
from antefix.model.model_config import ModelConfig
from antefix.model.norms_rope import RMSNorm, rms_norm, rotate
from antefix.model.numerics import sum_middle, wide


class Compressor(nn.Module):
    """Projections and norm of one compressor; `width` is C. CSA's main compressor also holds the indexer."""

    def __init__(self, config: ModelConfig, kind: LayerKind, width: int) -> None:
        super().__init__()
        geometry = config.geometry
        self.ratio = geometry.csa_ratio if kind is LayerKind.CSA else geometry.hca_ratio
        self.width = width
        series = 2 * width if kind is LayerKind.CSA else width
        self.kv_proj = nn.Linear(config.hidden_size, series, bias=False)
        self.gate_proj = nn.Linear(config.hidden_size, series, bias=False)
        self.position_bias = nn.Parameter(torch.empty(self.ratio, series))
        self.kv_norm = RMSNorm(width, config.rms_norm_eps)

    def input_modules(self) -> list[nn.Linear]:
        """The modules whose weights the layer's input is multiplied by."""
        return [self.kv_proj, self.gate_proj]

    def rows(self, x_ND: Tensor, done: Products = NO_PRODUCTS) -> tuple[Tensor, Tensor]:
        """Each token's kv and gate, [N, S] each, as the products give them."""
        return product_of(x_ND, self.kv_proj, done), product_of(x_ND, self.gate_proj, done)

    def project(self, x_ND: Tensor, positions_N: Tensor, done: Products = NO_PRODUCTS) -> Tensor:
        """Each token's rows [2, N, S]: kv, and the gate plus the bias for the token's place in its group."""
        if is_compiled(x_ND):
            from antefix.model.compiled import tokens

            return tokens.project(self, x_ND, positions_N)
        work = wide(x_ND.dtype)
        kv, gate = (rows.to(work) for rows in self.rows(x_ND, done))
        gate = gate + self.position_bias[positions_N % self.ratio]
        return torch.stack((kv, gate))


def pool_disjoint(rows_2GmS: Tensor) -> Tensor:
    """HCA: one entry [G, C] per group; for each channel a softmax over the group's gates weights its kv."""
    kv, gate = rows_2GmS
    return _pool(kv, gate)


def pool_overlapping(rows_2GmS: Tensor, overlap_2mC: Tensor) -> Tensor:
    """CSA: one entry [G, C] per group, from the previous group's Ca rows and the group's own Cb rows.

    overlap_2mC: Ca rows before the first group. If there are no such rows, kv is 0 and the gate is -inf, so they get no
    weight.
    """
    width = overlap_2mC.shape[-1]
    series_a = torch.cat((overlap_2mC.unsqueeze(1), rows_2GmS[:, :-1, :, :width]), dim=1)
    kv, gate = torch.cat((series_a, rows_2GmS[..., width:]), dim=2)
    return _pool(kv, gate)


def pool_pairs(rows_2GmS: Tensor, overlaps_2GmC: Tensor) -> Tensor:
    """`pool_overlapping` for groups that do not follow one another; each group comes with the Ca rows of its
    predecessor.
    """
    kv, gate = torch.cat((overlaps_2GmC, rows_2GmS[..., overlaps_2GmC.shape[-1] :]), dim=2)
    return _pool(kv, gate)


def _pool(kv_GmC: Tensor, gate_GmC: Tensor) -> Tensor:
    gate = gate_GmC.to(wide(gate_GmC.dtype))
    weights = torch.exp(gate - gate.amax(1, keepdim=True))
    # Dividing the sum instead of each weight saves one pass over [G, m, C].
    pooled = sum_middle(kv_GmC * weights.to(kv_GmC.dtype))
    return pooled / sum_middle(weights).to(kv_GmC.dtype)


def finish_entries(pooled_GC: Tensor, norm: RMSNorm, cos: Tensor, sin: Tensor) -> Tensor:
    """The norm, then RoPE at the position of each group's first token (cos, sin [G, R / 2])."""
    return rotate(rms_norm(pooled_GC, norm.weight, norm.eps), cos, sin)
