"""Says what a model directory holds and what memory it takes, from config and file headers; it reads no weight."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch

from antefix.layout import BlockLayout, KVFormat, LayerKind
from antefix.model.load_plan import LoadPlan, dtype_of
from antefix.model.loading import plan_model
from antefix.model.model import Model
from antefix.model.model_config import ModelConfig
from antefix.model.quant import width_of
from antefix.model.ranks import Ranks, split_model


@dataclass(frozen=True, slots=True, kw_only=True)
class KVBytes:
    """The memory that KV takes. pool_token: bytes per token of a pool on a CPU, which keeps decoded copies."""

    token: float
    pool_token: float
    block_tokens: int
    checkpoint: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """num_weights: numbers in all tensors that are run.  packed: bytes by form, such as "fp4 1x32 e8m0".

    memory_bytes: the memory of the weights in a worker (in each rank, if there are several), by the worker's dtype.
    file_bytes: bytes of the tensors in all files. skipped: bytes of tensors that are known but not used, by their kind.
    max_tokens: the number of positions that the config allows.
    """

    path: str
    layers: dict[str, int]
    hidden_size: int
    num_experts: int
    vocab_size: int
    max_tokens: int
    num_files: int
    num_tensors: int
    num_weights: int
    file_bytes: int
    memory_bytes: dict[str, int]
    packed: dict[str, int]
    skipped: dict[str, int]
    has_tokenizer: bool
    kv: KVBytes
    num_ranks: int = 1
    notes: tuple[str, ...] = field(default=())


def describe(directory: Path, *, kv_format: KVFormat = KVFormat.FP8, num_ranks: int = 1) -> Description:
    """Raises:  ModelError: the directory would not load; the message says why."""
    model, plan = plan_model(directory, kv_format=kv_format)
    config, num_weights = model.config, _num_weights(model, plan)
    if num_ranks > 1:
        split_model(model, Ranks(rank=0, size=num_ranks))
    state = model.state_dict()
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    sizes = {
        str(dtype).removeprefix("torch."): {
            name: tensor.numel() * dtype_of(name, tensor, dtype).itemsize for name, tensor in state.items()
        }
        for dtype in (torch.float32, torch.bfloat16)
    }
    layers = Counter(config.geometry.layers)
    sources = [copy.source for copy in plan.copies]
    return Description(
        path=str(directory),
        layers={str(kind): layers[kind] for kind in LayerKind if layers[kind]},
        hidden_size=config.hidden_size,
        num_experts=config.num_experts,
        vocab_size=config.vocab_size,
        max_tokens=config.max_position_embeddings,
        num_files=len({source.file for source in (*sources, *plan.skipped)}),
        num_tensors=len(sources) + len(plan.skipped),
        num_weights=num_weights,
        file_bytes=sum(source.nbytes for source in (*sources, *plan.skipped)),
        memory_bytes={dtype: sum(of_dtype.values()) for dtype, of_dtype in sizes.items()},
        packed=_packed(plan, sizes["float32"]),
        skipped=_skipped(plan, config),
        has_tokenizer=any((directory / name).is_file() for name in ("tokenizer.json", "antefix_tokenizer.json")),
        kv=kv_bytes(model.layout),
        num_ranks=num_ranks,
        notes=config.notes,
    )


def kv_bytes(layout: BlockLayout) -> KVBytes:
    block_tokens = layout.geometry.block_size
    decoded = 0
    if layout.kv_format is KVFormat.FP8:
        decoded = sum(part.num_rows * width_of(part, layout) * 4 for part in layout.parts)
    return KVBytes(
        token=layout.bytes_per_token,
        pool_token=(layout.block_bytes + decoded) / block_tokens,
        block_tokens=block_tokens,
        checkpoint=layout.checkpoint_bytes,
    )


def _num_weights(model: Model, plan: LoadPlan) -> int:
    count = 0
    for name, tensor in model.state_dict().items():
        owner, _, own = name.rpartition(".")
        if own == "scales":
            continue
        doubled = own == "codes" and plan.forms[owner].is_fp4
        count += tensor.numel() * (2 if doubled else 1)
    return count


def _packed(plan: LoadPlan, sizes: dict[str, int]) -> dict[str, int]:
    found: Counter[str] = Counter()
    for owner, form in plan.forms.items():
        found[form.label] += sizes[f"{owner}.codes"] + sizes[f"{owner}.scales"]
    return dict(found)


def _skipped(plan: LoadPlan, config: ModelConfig) -> dict[str, int]:
    """Bytes of tensors that are not used: draft modules as "mtp" or "dspark", the copy of a tied head as "head"."""
    found: Counter[str] = Counter()
    for tensor in plan.skipped:
        found[(config.draft or "mtp") if "mtp." in tensor.name else "head"] += tensor.nbytes
    return dict(found)
