"""A model with V4-Flash's shapes in its released formats, whose weights are drawn at random on the device.

149 GiB of weights are too large for most disks. Each rank draws its own share of the weights. For a tensor that every
rank holds whole, the seed depends on the tensor's name, so all ranks draw the same values. For a tensor that is split
over ranks, the seed also depends on the rank, so a different number of ranks gives a different model.
"""

from __future__ import annotations

import hashlib
import math
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from antefix.layout import KVFormat
from antefix.model import Model, ModelConfig
from antefix.model.load_plan import dtype_of, pack_module
from antefix.model.norms_rope import inverse_frequencies
from antefix.model.packed import PackedForm, PackedLinear, PackedStack
from antefix.model.ranks import Ranks, split_model

E8M0 = torch.float8_e8m0fnu
FORMS = {
    "fp8": PackedForm(is_fp4=False, block=(128, 128), scale_dtype=E8M0),
    "fp8 float32": PackedForm(is_fp4=False, block=(128, 128), scale_dtype=torch.float32),
    "fp4": PackedForm(is_fp4=True, block=(1, 32), scale_dtype=E8M0),
}
# V4-Flash's own sizes are a config's defaults.
FLASH: dict[str, Any] = {
    "model_type": "deepseek_v4", "num_hash_layers": 3, "expert_dtype": "fp4",
    "quantization_config": {"quant_method": "fp8", "scale_fmt": "ue8m0"},
}  # fmt: skip
# The smallest possible sizes in the same formats, to test that the code runs.
TOY: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 128, "num_attention_heads": 4, "head_dim": 128, "q_lora_rank": 128, "o_groups": 4,
    "o_lora_rank": 128, "index_n_heads": 16, "index_head_dim": 64, "index_topk": 8, "moe_intermediate_size": 128,
    "n_routed_experts": 8, "num_experts_per_tok": 2, "num_hash_layers": 1, "sliding_window": 16, "qk_rope_head_dim": 16,
}  # fmt: skip
# Sizes with which exchanges between ranks are timed: rows of picked experts of 1, 128 and 2,048 tokens.
EXCHANGES = (6, 6 * 128, 6 * 2048)
# Times of exchanges between this process' ranks, measured while it drew the weights.
timed_exchanges: list[dict[str, float]] = []
_FP8 = (
    "self_attn.q_a_proj", "self_attn.q_b_proj", "self_attn.kv_proj", "self_attn.o_a_proj", "self_attn.o_b_proj",
    "indexer.q_b_proj", "shared_experts.gate_proj", "shared_experts.up_proj", "shared_experts.down_proj",
    "mtp.0.e_proj", "mtp.0.h_proj",
)  # fmt: skip


def config_of(num_layers: int, *, toy: bool = False) -> dict[str, Any]:
    """A config.json with the first layers of Flash's plan."""
    plan = {"num_hidden_layers": num_layers, "compress_ratios": [0, 0, *[4, 128] * 20, 4][:num_layers]}
    return FLASH | (TOY if toy else {}) | plan


def draw_share(
    *,
    ranks: Ranks | None,
    device: str,
    num_layers: int,
    toy: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    drafts: bool = False,
) -> Model:
    """A rank's share of such a model, or the whole model, on the rank's device. drafts: with the draft layer."""
    config = ModelConfig.from_dict(config_of(num_layers, toy=toy))
    with torch.device("meta"):
        model = Model(config, kv_format=KVFormat.FP8, drafts=drafts)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name.endswith(_FP8) and "compressor.kv" not in name:
            form = FORMS["fp8"].plain_inputs() if name.endswith("o_a_proj") else FORMS["fp8"]
            pack_module(model, name, module.weight.shape, form)
    for name, parameter in list(model.named_parameters()):
        if name.endswith((".experts.gate_up_proj", ".experts.down_proj")):
            pack_module(model, name, parameter.shape, FORMS["fp4"])
    cuts = split_model(model, ranks) if ranks is not None else {}
    modules = dict(model.named_modules())
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        rank = ranks.rank if ranks is not None and name in cuts else 0
        generator = torch.Generator(device).manual_seed(_seed(f"{name} {rank}"))
        state[name] = _draw(name, tensor, modules[name.rpartition(".")[0]], config, dtype, generator)
    model.load_state_dict(state, strict=True, assign=True)
    model.rope_main = inverse_frequencies(config.rope_main, config.geometry.rope_dim).to(device)
    model.rope_compress = inverse_frequencies(config.rope_compress, config.geometry.rope_dim).to(device)
    return model.requires_grad_(False).eval()


def draw_with_exchanges(*, ranks: Ranks, device: str, hidden: int, **settings: Any) -> Model:
    """`draw_share`, which also times exchanges between ranks by size; all ranks must take part."""
    timed_exchanges[:] = [time_exchange(ranks, device, rows, hidden) for rows in EXCHANGES]
    return draw_share(ranks=ranks, device=device, **settings)


def time_exchange(ranks: Ranks, device: str, rows: int, hidden: int) -> dict[str, float]:
    x = torch.zeros(rows, hidden, device=device, dtype=torch.bfloat16)
    for _ in range(3):
        dist.all_reduce(x, group=ranks.group)
    _synchronize(device)
    started = time.perf_counter()
    for _ in range(20):
        dist.all_reduce(x, group=ranks.group)
    _synchronize(device)
    seconds = (time.perf_counter() - started) / 20
    nbytes = x.numel() * x.element_size()
    return {"rows": rows, "bytes": nbytes, "us": seconds * 1e6, "gb_per_s": nbytes / seconds / 1e9}


def draw_codes(shape: torch.Size, *, is_fp4: bool, generator: torch.Generator | None = None) -> Tensor:
    """Random codes of the format, except NaN."""
    codes = torch.randint(0, 256, shape, device=_device(generator), dtype=torch.uint8, generator=generator)
    if is_fp4:
        return codes
    return torch.where((codes & 127) == 127, 0, codes).view(torch.float8_e4m3fn)


def draw_scales(shape: torch.Size, form: PackedForm, addends: int, generator: torch.Generator | None = None) -> Tensor:
    """Scales with which a product of inputs of size 1 gives outputs of about size 1."""
    middle = 127 + round(math.log2(1 / ((3 if form.is_fp4 else 120) * addends**0.5)))
    bytes_ = torch.randint(
        middle - 1, middle + 2, shape, device=_device(generator), dtype=torch.uint8, generator=generator
    )
    powers = bytes_.view(E8M0)
    return powers if form.scale_dtype is E8M0 else powers.float() * 1.3


def _draw(
    name: str, like: Tensor, module: nn.Module, config: ModelConfig, dtype: torch.dtype, generator: torch.Generator
) -> Tensor:
    if isinstance(module, PackedLinear | PackedStack):
        addends = module.in_features if isinstance(module, PackedLinear) else module.shape[2]
        if name.endswith(".codes"):
            return draw_codes(like.shape, is_fp4=module.form.is_fp4, generator=generator)
        return draw_scales(like.shape, module.form, addends, generator)
    device = generator.device
    if name.endswith("tid2eid"):
        order = torch.rand(len(like), config.num_experts, device=device, generator=generator).argsort(1)
        return order[:, : config.num_experts_per_token].contiguous()
    dtype = dtype_of(name, like, dtype)
    if "norm" in name or name.endswith("scale"):
        return torch.ones(like.shape, device=device, dtype=dtype)
    drawn = torch.randn(like.shape, device=device, generator=generator).to(dtype)
    return drawn * like.shape[-1] ** -0.5


def _device(generator: torch.Generator | None) -> torch.device:
    return torch.device("cuda") if generator is None else generator.device


def _seed(text: str) -> int:
    """A seed that is the same in every process; Python's own hash is not."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest())


def _synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
