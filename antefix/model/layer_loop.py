"""Runs the layers in order, from tokens to the final streams: one loop for every way of running attention.

Shapes:  N = tokens, M = streams, D = hidden size, R = RoPE dims.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol, cast

from torch import Tensor

from antefix.layout import LayerKind
from antefix.model.attention import Attention
from antefix.model.mhc import expand
from antefix.model.model import DecoderLayer, Model


class Attend(Protocol):
    """Runs a layer's attention over a batch: from x [N, D], normed, to the attention block's output [N, D]."""

    def __call__(self, layer: int, attention: Attention, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor: ...


def run_layers(
    model: Model,
    tokens: Tensor,
    positions: Tensor | None,
    num_tokens: int,
    attend: Attend,
    after_layer: Callable[[], None] | None = None,
    ropes: Mapping[LayerKind, tuple[Tensor, Tensor]] | None = None,
) -> Tensor:
    """The streams [N, M, D] after the last layer. tokens, positions [N]: the first `num_tokens` rows are tokens, the
    rest is padding. after_layer: called after each layer (`antefix.model.pauses`). ropes: cos and sin at the positions,
    by kind of layer; None: they are computed here.
    """
    if ropes is None:
        assert positions is not None
        ropes = {kind: model.rope(kind, positions) for kind in set(model.config.geometry.layers)}
    streams: Tensor = model.model.embed_tokens(tokens).unsqueeze(1).repeat(1, model.config.hc_mult, 1)
    live = tokens[:num_tokens]
    for index, module in enumerate(model.model.layers):
        layer = cast(DecoderLayer, module)
        x, post, comb = layer.attn_hc.normed(streams, layer.input_layernorm)
        output = attend(index, layer.self_attn, x, ropes[layer.self_attn.kind])
        streams = expand(streams, output, post, comb)
        x, post, comb = layer.ffn_hc.normed(streams, layer.post_attention_layernorm)
        streams = expand(streams, layer.mlp(x, live), post, comb)
        if after_layer is not None:
            after_layer()
    return streams
