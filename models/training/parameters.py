"""Names, shapes and first values of a `deepseek_v4` model's parameters, as transformers names them.

A flat dict is all that training needs: the optimiser, the checkpoint file and `antefix.model` share its keys.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Config = Mapping[str, Any]
Parameters = dict[str, Tensor]

# Buffers: saved with the weights, never touched by the optimiser.
BUFFERS = ("tid2eid", "e_score_correction_bias")


def read_config(directory: Path) -> dict[str, Any]:
    """The config.json of a model directory."""
    config: dict[str, Any] = json.loads((directory / "config.json").read_text())
    return config


def parameter_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Every tensor of the checkpoint, buffers included, in file order."""
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for layer, kind in enumerate(config["layer_types"]):
        prefix = f"model.layers.{layer}."
        parts = _norms_and_streams(config) | _attention(config, kind) | _experts(config, layer)
        shapes |= {prefix + name: shape for name, shape in parts.items()}
    streams = config["hc_mult"]
    return shapes | {
        "model.norm.weight": (hidden,),
        "model.hc_head.hc_fn": (streams, streams * hidden),
        "model.hc_head.hc_base": (streams,),
        "model.hc_head.hc_scale": (1,),
        "lm_head.weight": (vocab, hidden),
    }


def _norms_and_streams(config: Config) -> dict[str, tuple[int, ...]]:
    hidden, streams = config["hidden_size"], config["hc_mult"]
    rows = streams * (2 + streams)
    shapes: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }
    for site in ("attn_hc", "ffn_hc"):
        shapes |= {f"{site}.fn": (rows, streams * hidden), f"{site}.base": (rows,), f"{site}.scale": (3,)}
    return shapes


def _attention(config: Config, kind: str) -> dict[str, tuple[int, ...]]:
    hidden, dim, heads = config["hidden_size"], config["head_dim"], config["num_attention_heads"]
    rank, groups, out_rank = config["q_lora_rank"], config["o_groups"], config["o_lora_rank"]
    shapes: dict[str, tuple[int, ...]] = {
        "self_attn.sinks": (heads,),
        "self_attn.q_a_proj.weight": (rank, hidden),
        "self_attn.q_a_norm.weight": (rank,),
        "self_attn.q_b_proj.weight": (heads * dim, rank),
        "self_attn.kv_proj.weight": (dim, hidden),
        "self_attn.kv_norm.weight": (dim,),
        "self_attn.o_a_proj.weight": (groups * out_rank, heads * dim // groups),
        "self_attn.o_b_proj.weight": (hidden, groups * out_rank),
    }
    compressor = "self_attn.compressor."
    if kind == "heavily_compressed_attention":
        shapes |= _compressor(compressor, hidden, dim, config["compress_rates"][kind], series=1)
    elif kind == "compressed_sparse_attention":
        ratio, index_dim = config["compress_rates"][kind], config["index_head_dim"]
        shapes |= _compressor(compressor, hidden, dim, ratio, series=2)
        shapes |= _compressor(compressor + "indexer.", hidden, index_dim, ratio, series=2)
        shapes |= {
            compressor + "indexer.q_b_proj.weight": (config["index_n_heads"] * index_dim, rank),
            compressor + "indexer.scorer.weights_proj.weight": (config["index_n_heads"], hidden),
        }
    return shapes


def _compressor(prefix: str, hidden: int, dim: int, ratio: int, *, series: int) -> dict[str, tuple[int, ...]]:
    return {
        prefix + "position_bias": (ratio, series * dim),
        prefix + "kv_proj.weight": (series * dim, hidden),
        prefix + "gate_proj.weight": (series * dim, hidden),
        prefix + "kv_norm.weight": (dim,),
    }


def _experts(config: Config, layer: int) -> dict[str, tuple[int, ...]]:
    hidden, inner, experts = config["hidden_size"], config["moe_intermediate_size"], config["n_routed_experts"]
    shapes: dict[str, tuple[int, ...]] = {
        "mlp.gate.weight": (experts, hidden),
        "mlp.experts.gate_up_proj": (experts, 2 * inner, hidden),
        "mlp.experts.down_proj": (experts, hidden, inner),
        "mlp.shared_experts.gate_proj.weight": (inner, hidden),
        "mlp.shared_experts.up_proj.weight": (inner, hidden),
        "mlp.shared_experts.down_proj.weight": (hidden, inner),
    }
    if config["mlp_layer_types"][layer] == "hash_moe":
        return shapes | {"mlp.gate.tid2eid": (config["vocab_size"], config["num_experts_per_tok"])}
    return shapes | {"mlp.gate.e_score_correction_bias": (experts,)}


def initial_parameters(config: Config, *, seed: int, noise: float = 0.0) -> Parameters:
    """First values for training; with `noise`, a random model in which no parameter is trivial.

    `noise` moves norm weights off one and sinks, biases and hyper-connection terms off zero, so that a test on random
    weights fails when any of them is left out or mixed up. Training starts from `noise=0`.
    """
    generator = torch.Generator().manual_seed(seed)
    return {
        name: _first_value(name, shape, config, noise, generator) for name, shape in parameter_shapes(config).items()
    }


def _first_value(name: str, shape: tuple[int, ...], config: Config, noise: float, generator: torch.Generator) -> Tensor:
    def normal(std: float) -> Tensor:
        return torch.randn(shape, generator=generator) * std

    leaf = name.removesuffix(".weight").rpartition(".")[2]
    if leaf == "tid2eid":
        return _hash_table(shape, config["n_routed_experts"], generator)
    if leaf.endswith("norm"):
        return 1.0 + normal(noise)
    if leaf in ("sinks", "e_score_correction_bias"):
        return normal(noise if leaf == "sinks" else noise / 10)
    if leaf in ("base", "hc_base"):
        return _stream_base(shape[0], config["hc_mult"]) + normal(noise)
    if leaf in ("scale", "hc_scale"):
        # Small, so that training starts near the static mixing that `base` gives.
        return torch.full(shape, 0.1 if noise == 0 else 0.5) + normal(noise / 4)
    if leaf == "position_bias":
        return normal(max(noise, 0.02))
    if leaf == "embed_tokens":
        return normal(1.0)
    out_of_residual = leaf in ("o_b_proj", "down_proj")
    depth = math.sqrt(2 * config["num_hidden_layers"]) if out_of_residual and noise == 0 else 1.0
    return normal(1.0 / math.sqrt(shape[-1]) / depth)


def _stream_base(rows: int, streams: int) -> Tensor:
    """Biases of a hyper-connection: read the mean of the streams, write to all, keep each stream in its place.

    The logits 4 on the diagonal of the mixing matrix give a doubly stochastic matrix close to the identity.
    """
    read = torch.full((streams,), -math.log(streams - 1.0) if streams > 1 else 0.0)
    if rows == streams:
        return read
    write = torch.zeros(streams)
    return torch.cat([read, write, 4.0 * torch.eye(streams).flatten()])


def _hash_table(shape: tuple[int, ...], experts: int, generator: torch.Generator) -> Tensor:
    """Token id to experts: distinct ones per token, each expert equally often over the vocabulary."""
    vocab, chosen = shape
    rows = torch.rand((vocab, experts), generator=generator).argsort(dim=1)[:, :chosen]
    return rows.to(torch.int64).contiguous()


def trainable(parameters: Parameters) -> Parameters:
    """The parameters that the optimiser moves."""
    return {name: value for name, value in parameters.items() if not name.endswith(BUFFERS)}


def save_parameters(parameters: Parameters, path: Path, *, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write model.safetensors: floats as `dtype`, the hash tables as int64."""
    tensors = {
        name: value.detach().to("cpu", dtype if value.is_floating_point() else torch.int64).contiguous()
        for name, value in parameters.items()
    }
    save_file(tensors, str(path), metadata={"format": "pt"})


def load_parameters(path: Path, *, dtype: torch.dtype = torch.float32) -> Parameters:
    """Read a model.safetensors, floats as `dtype`."""
    tensors = load_file(str(path))
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in tensors.items()}
