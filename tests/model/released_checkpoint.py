"""Writes small checkpoints in exactly the format of DeepSeek-V4's releases, with its own code for quantising.

flash       FP8 E4M3 with UE8M0 scales over 128x128, FP4 experts with UE8M0 scales over 32, one MTP layer
base        experts in FP8 too, float32 scales
dspark      as flash; DSpark's three draft layers in place of MTP, 46 ratios' way of padding
pro         as flash, HCA first, no window-only layer
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

YARN = {"type": "yarn", "factor": 16, "beta_fast": 32, "beta_slow": 1, "original_max_position_embeddings": 64}
FLASH: dict[str, Any] = {
    "architectures": ["DeepseekV4ForCausalLM"], "model_type": "deepseek_v4", "attention_bias": False,
    "attention_dropout": 0.0, "bos_token_id": 0, "eos_token_id": 1, "expert_dtype": "fp4", "hc_eps": 1e-6,
    "hc_mult": 4, "hc_sinkhorn_iters": 6, "head_dim": 64, "hidden_act": "silu", "hidden_size": 128,
    "index_head_dim": 32, "index_n_heads": 16, "index_topk": 8, "initializer_range": 0.02,
    "max_position_embeddings": 4096, "moe_intermediate_size": 128, "n_routed_experts": 4, "n_shared_experts": 1,
    "norm_topk_prob": True, "num_attention_heads": 4, "num_experts_per_tok": 2, "num_hidden_layers": 5,
    "num_hash_layers": 1, "num_key_value_heads": 1, "num_nextn_predict_layers": 1, "o_groups": 2, "o_lora_rank": 128,
    "q_lora_rank": 128, "qk_rope_head_dim": 16, "rms_norm_eps": 1e-6, "rope_scaling": YARN, "rope_theta": 10000,
    "quantization_config": {
        "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "scale_fmt": "ue8m0",
        "weight_block_size": [128, 128],
    },
    "routed_scaling_factor": 1.5, "scoring_func": "sqrtsoftplus", "sliding_window": 16, "swiglu_limit": 10.0,
    "tie_word_embeddings": False, "topk_method": "noaux_tc", "torch_dtype": "bfloat16", "use_cache": True,
    "vocab_size": 64, "compress_rope_theta": 160000, "compress_ratios": [0, 0, 4, 128, 4, 0],
}  # fmt: skip
DSPARK = {
    "compress_ratios": [0, 0, 4, 128, 4, 0, 0, 0], "num_nextn_predict_layers": 3, "dspark_block_size": 5,
    "dspark_markov_rank": 16, "dspark_noise_token_id": 63, "dspark_target_layer_ids": [2, 3, 4],
}  # fmt: skip
RELEASES: dict[str, dict[str, Any]] = {
    "flash": FLASH,
    "base": FLASH | {"expert_dtype": "fp8"},
    "dspark": FLASH | DSPARK,
    "pro": FLASH | {"compress_ratios": [128, 128, 4, 128, 4, 0]},
}
# The fields of the released Flash and Pro configs that decide shapes. Other fields are as above.
FULL_FLASH = FLASH | {
    "head_dim": 512, "hidden_size": 4096, "index_head_dim": 128, "index_n_heads": 64, "index_topk": 512,
    "hc_sinkhorn_iters": 20, "max_position_embeddings": 1048576, "moe_intermediate_size": 2048, "n_routed_experts": 256,
    "num_attention_heads": 64, "num_experts_per_tok": 6, "num_hidden_layers": 43, "num_hash_layers": 3, "o_groups": 8,
    "o_lora_rank": 1024, "q_lora_rank": 1024, "qk_rope_head_dim": 64, "sliding_window": 128, "vocab_size": 129280,
    "rope_scaling": YARN | {"original_max_position_embeddings": 65536}, "compress_ratios": [0, 0, *[4, 128] * 20, 4, 0],
}  # fmt: skip
FULL_PRO = FULL_FLASH | {
    "hidden_size": 7168, "num_hidden_layers": 61, "num_attention_heads": 128, "index_topk": 1024, "q_lora_rank": 1536,
    "o_groups": 16, "moe_intermediate_size": 3072, "n_routed_experts": 384,
    "compress_ratios": [128, 128, *[4, 128] * 29, 4, 0],
}  # fmt: skip
_DTYPES = {
    torch.bfloat16: "BF16", torch.float32: "F32", torch.int64: "I64", torch.int8: "I8",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e8m0fnu: "F8_E8M0",
}  # fmt: skip
_E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def write(release: str, directory: Path, *, num_shards: int = 3, seed: int = 1, **changes: Any) -> Path:
    """Write the directory of a release. `changes` go into its config. The same arguments give the same bytes."""
    config = RELEASES[release] | changes
    tensors = draw(config, seed=seed)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    names = sorted(tensors)
    weight_map = {}
    for shard in range(num_shards):
        file = f"model-{shard + 1:05d}-of-{num_shards:05d}.safetensors"
        held = {name: tensors[name] for name in names[shard::num_shards]}
        save_file(held, directory / file)
        weight_map |= dict.fromkeys(held, file)
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def write_sparse(config: dict[str, Any], directory: Path, *, num_shards: int = 46) -> Path:
    """Write a directory of any size, with real headers, and tensors that are holes in sparse files."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    tensors = draw(config, pen=_Ruler(config))
    names, weight_map = sorted(tensors), {}
    for shard in range(num_shards):
        file = f"model-{shard + 1:05d}-of-{num_shards:05d}.safetensors"
        header, end = {}, 0
        for name in names[shard::num_shards]:
            start, end = end, end + tensors[name].numel() * tensors[name].element_size()
            header[name] = {"dtype": _DTYPES[tensors[name].dtype], "shape": list(tensors[name].shape),
                            "data_offsets": [start, end]}  # fmt: skip
            weight_map[name] = file
        text = json.dumps(header).encode()
        with (directory / file).open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            stream.truncate(8 + len(text) + end)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return directory


def draw(config: dict[str, Any], *, seed: int = 1, pen: _Pen | None = None) -> dict[str, Tensor]:
    """Every tensor under its released name. Each tensor affects the result."""
    pen = pen or _Pen(config, torch.Generator().manual_seed(seed))
    hidden, streams = config["hidden_size"], config["hc_mult"]
    pen.bfloat16("embed.weight", config["vocab_size"], hidden)
    pen.bfloat16("head.weight", config["vocab_size"], hidden)
    pen.norm("norm.weight", hidden)
    pen.head_mixing("")
    for layer in range(config["num_hidden_layers"]):
        is_hash = layer < config["num_hash_layers"]
        pen.layer(f"layers.{layer}.", config["compress_ratios"][layer], is_hash=is_hash)
    is_dspark = "dspark_block_size" in config
    for stage in range(config["num_nextn_predict_layers"]):
        prefix = f"mtp.{stage}."
        pen.layer(prefix, 0, is_hash=False)
        if is_dspark:
            pen.dspark(prefix, stage)
        else:
            pen.packed(f"{prefix}e_proj", hidden, hidden)
            pen.packed(f"{prefix}h_proj", hidden, hidden)
            for name in ("enorm", "hnorm", "norm"):
                pen.norm(f"{prefix}{name}.weight", hidden)
            pen.head_mixing(prefix)
    assert pen.tensors["layers.0.hc_attn_fn"].shape == ((2 + streams) * streams, streams * hidden)
    return pen.tensors


class _Pen:
    def __init__(self, config: dict[str, Any], generator: torch.Generator) -> None:
        self.config = config
        self.tensors: dict[str, Tensor] = {}
        self._generator = generator
        self._float_scales = config["expert_dtype"] == "fp8"

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._generator)

    def bfloat16(self, name: str, *shape: int) -> None:
        self.tensors[name] = (self.normal(*shape) * 1.2 / shape[-1] ** 0.5).bfloat16()

    def table(self, name: str, vocab: int, picked: int) -> None:
        ranks = torch.rand(vocab, self.config["n_routed_experts"], generator=self._generator).argsort(-1)
        self.tensors[name] = ranks[:, :picked].contiguous()

    def norm(self, name: str, size: int) -> None:
        self.tensors[name] = (1 + 0.2 * self.normal(size)).bfloat16()

    def float32(self, name: str, *shape: int, scale: float = 0.5, around: float = 0.0) -> None:
        self.tensors[name] = around + scale * self.normal(*shape)

    def packed(self, name: str, *shape: int) -> None:
        codes, scales = to_fp8(self.normal(*shape) * 1.2 / shape[-1] ** 0.5, float_scales=self._float_scales)
        self.tensors |= {f"{name}.weight": codes, f"{name}.scale": scales}

    def expert(self, name: str, *shape: int) -> None:
        if self.config["expert_dtype"] == "fp8":
            return self.packed(name, *shape)
        codes, scales = to_fp4(self.normal(*shape) * 1.2 / shape[-1] ** 0.5)
        self.tensors |= {f"{name}.weight": codes, f"{name}.scale": scales}
        return None

    def head_mixing(self, prefix: str) -> None:
        streams, hidden = self.config["hc_mult"], self.config["hidden_size"]
        self.float32(f"{prefix}hc_head_fn", streams, streams * hidden, scale=1.2 / (streams * hidden) ** 0.5)
        self.float32(f"{prefix}hc_head_base", streams)
        self.float32(f"{prefix}hc_head_scale", 1, scale=0.2, around=1.0)

    def layer(self, prefix: str, ratio: int, *, is_hash: bool) -> None:
        self.attention(f"{prefix}attn.", ratio)
        self.feed_forward(f"{prefix}ffn.", is_hash=is_hash)
        hidden, streams = self.config["hidden_size"], self.config["hc_mult"]
        self.norm(f"{prefix}attn_norm.weight", hidden)
        self.norm(f"{prefix}ffn_norm.weight", hidden)
        logits = (2 + streams) * streams
        for kind in ("attn", "ffn"):
            self.float32(f"{prefix}hc_{kind}_fn", logits, streams * hidden, scale=1.2 / (streams * hidden) ** 0.5)
            self.float32(f"{prefix}hc_{kind}_base", logits)
            self.float32(f"{prefix}hc_{kind}_scale", 3, scale=0.2, around=1.0)

    def attention(self, prefix: str, ratio: int) -> None:
        config = self.config
        hidden, rank, dim, heads = (
            config[name] for name in ("hidden_size", "q_lora_rank", "head_dim", "num_attention_heads")
        )
        groups, o_rank = config["o_groups"], config["o_lora_rank"]
        self.packed(f"{prefix}wq_a", rank, hidden)
        self.packed(f"{prefix}wq_b", heads * dim, rank)
        self.packed(f"{prefix}wkv", dim, hidden)
        self.packed(f"{prefix}wo_a", groups * o_rank, heads * dim // groups)
        self.packed(f"{prefix}wo_b", hidden, groups * o_rank)
        self.norm(f"{prefix}q_norm.weight", rank)
        self.norm(f"{prefix}kv_norm.weight", dim)
        self.float32(f"{prefix}attn_sink", heads)
        if not ratio:
            return
        self.compressor(f"{prefix}compressor.", ratio, dim)
        if ratio == 4:
            index_dim, index_heads = config["index_head_dim"], config["index_n_heads"]
            self.compressor(f"{prefix}indexer.compressor.", ratio, index_dim)
            self.packed(f"{prefix}indexer.wq_b", index_heads * index_dim, rank)
            self.bfloat16(f"{prefix}indexer.weights_proj.weight", index_heads, hidden)

    def compressor(self, prefix: str, ratio: int, dim: int) -> None:
        series = 2 * dim if ratio == 4 else dim
        self.bfloat16(f"{prefix}wkv.weight", series, self.config["hidden_size"])
        self.bfloat16(f"{prefix}wgate.weight", series, self.config["hidden_size"])
        self.float32(f"{prefix}ape", ratio, series)
        self.norm(f"{prefix}norm.weight", dim)

    def feed_forward(self, prefix: str, *, is_hash: bool) -> None:
        config = self.config
        hidden, inner, experts = (config[n] for n in ("hidden_size", "moe_intermediate_size", "n_routed_experts"))
        self.bfloat16(f"{prefix}gate.weight", experts, hidden)
        if is_hash:
            self.table(f"{prefix}gate.tid2eid", config["vocab_size"], config["num_experts_per_tok"])
        else:
            self.float32(f"{prefix}gate.bias", experts, scale=0.3)
        shapes = {"w1": (inner, hidden), "w2": (hidden, inner), "w3": (inner, hidden)}
        for name, shape in shapes.items():
            self.packed(f"{prefix}shared_experts.{name}", *shape)
            for expert in range(experts):
                self.expert(f"{prefix}experts.{expert}.{name}", *shape)

    def dspark(self, prefix: str, stage: int) -> None:
        config = self.config
        hidden, rank = config["hidden_size"], config["dspark_markov_rank"]
        if stage == 0:
            self.packed(f"{prefix}main_proj", hidden, hidden * len(config["dspark_target_layer_ids"]))
            self.norm(f"{prefix}main_norm.weight", hidden)
        if stage == config["num_nextn_predict_layers"] - 1:
            self.norm(f"{prefix}norm.weight", hidden)
            self.head_mixing(prefix)
            self.bfloat16(f"{prefix}markov_head.markov_w1.weight", config["vocab_size"], rank)
            self.bfloat16(f"{prefix}markov_head.markov_w2.weight", config["vocab_size"], rank)
            self.bfloat16(f"{prefix}confidence_head.proj.weight", 1, hidden + rank)


class _Ruler(_Pen):
    """The same tensors without their numbers."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config, torch.Generator())

    def _put(self, name: str, dtype: torch.dtype, *shape: int) -> None:
        self.tensors[name] = torch.empty(shape, dtype=dtype, device="meta")

    def bfloat16(self, name: str, *shape: int) -> None:
        self._put(name, torch.bfloat16, *shape)

    def norm(self, name: str, size: int) -> None:
        self._put(name, torch.bfloat16, size)

    def float32(self, name: str, *shape: int, **_: float) -> None:
        self._put(name, torch.float32, *shape)

    def table(self, name: str, vocab: int, picked: int) -> None:
        self._put(name, torch.int64, vocab, picked)

    def packed(self, name: str, *shape: int) -> None:
        self._put(f"{name}.weight", torch.float8_e4m3fn, *shape)
        kind = torch.float32 if self._float_scales else torch.float8_e8m0fnu
        self._put(f"{name}.scale", kind, -(-shape[0] // 128), -(-shape[1] // 128))

    def expert(self, name: str, *shape: int) -> None:
        if self._float_scales:
            return self.packed(name, *shape)
        self._put(f"{name}.weight", torch.int8, shape[0], shape[1] // 2)
        return self._put(f"{name}.scale", torch.float8_e8m0fnu, shape[0], shape[1] // 32)


def to_fp8(x: Tensor, *, float_scales: bool = False, block: int = 128) -> tuple[Tensor, Tensor]:
    """Codes and scales over blocks, including incomplete blocks at the edges."""
    rows, columns = -(-x.shape[0] // block), -(-x.shape[1] // block)
    codes, scales = torch.empty(x.shape, dtype=torch.float8_e4m3fn), torch.empty(rows, columns)
    for i in range(rows):
        for j in range(columns):
            part = slice(i * block, (i + 1) * block), slice(j * block, (j + 1) * block)
            scale = x[part].abs().max() / 448
            scales[i, j] = scale if float_scales else 2.0 ** torch.ceil(torch.log2(scale))
            codes[part] = (x[part] / scales[i, j]).to(torch.float8_e4m3fn)
    return codes, scales if float_scales else scales.to(torch.float8_e8m0fnu)


def to_fp4(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales. An int8 holds two codes, with the even column in the low nibble. A scale covers 32 columns."""
    groups = x.unflatten(1, (-1, 32))
    scales = 2.0 ** torch.ceil(torch.log2(groups.abs().amax(2) / 6))
    values = (groups / scales.unsqueeze(2)).flatten(1)
    nearest = torch.bucketize(values.abs(), (_E2M1[1:] + _E2M1[:-1]) / 2)
    codes = nearest.to(torch.uint8) | ((values < 0).to(torch.uint8) << 3)
    return (codes[:, 0::2] | (codes[:, 1::2] << 4)).view(torch.int8), scales.to(torch.float8_e8m0fnu)
