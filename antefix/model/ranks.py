"""One model over several processes: each rank has its share of the heads and experts, and a full copy of the rest.

Every rank runs the same calls in the same order, on its own pool and window states, whose bytes are equal on all
ranks. A rank computes its heads and its experts, and the results are gathered, never added up: each number comes from
one rank, by the same sum that a single process would compute. So on a CPU the number of ranks changes no bit: KV has
the same names for any number of ranks, and workers with different numbers share a store. On a GPU a rank's share of a
weight may be summed in other parts than the whole weight, and fewer heads may use another kernel. So on GPUs, the
number of GPUs is part of the names of KV.

    layer         split                                   gathered                          as a whole on each rank
    attention     heads: wq_b, sinks, attention itself;   [N, G * R] of the output groups   wq_a, wkv, compressors,
                  wo_a by output groups                                                     indexer, wo_b
    experts       by expert: each rank has E / ranks      [N * K, D] rows of all picks      router, shared expert

A layer whose sizes cannot be divided by the number of ranks is not split. `lead` and `follower` make every rank run the
same calls.

Shapes:  N = tokens, G = output groups, R = output rank, E = experts, K = experts per token, D = hidden size.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from antefix.errors import ConfigError, InternalError
from antefix.model.exchange_time import ExchangeTime
from antefix.model.packed import PackedLinear, PackedStack

if TYPE_CHECKING:
    from antefix.model.load_plan import Copy
    from antefix.model.model import DecoderLayer, Model

# Rows of a pool are copied together before they are sent, this many bytes at once.
_SHARED_BYTES = 64 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """The place of this process among the processes that run one model.

    group: the process group; None where nothing is run, for example to compute which part of a load is this rank's.
    """

    rank: int
    size: int
    group: dist.ProcessGroup | None = None
    time: ExchangeTime = field(default_factory=ExchangeTime)

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise ConfigError(f"rank {self.rank} is not one of {self.size} ranks")

    @classmethod
    def of_group(cls) -> Ranks:
        """The ranks of the initialised process group.  Raises:  ConfigError: none is initialised."""
        if not dist.is_available() or not dist.is_initialized():
            raise ConfigError("a model over several ranks needs torch.distributed to be initialised")
        return cls(rank=dist.get_rank(), size=dist.get_world_size(), group=dist.group.WORLD)

    def span(self, count: int) -> tuple[int, int]:
        """The share [first, stop) of `count` that this rank has; `count` must be divisible by the number of ranks."""
        share = count // self.size
        return self.rank * share, (self.rank + 1) * share

    def gather(self, x: Tensor) -> Tensor:
        """Join the ranks' tensors [N, C] side by side: [N, ranks * C]."""
        return torch.cat(self._gather(x.contiguous()), 1)

    def gather_rows(self, x: Tensor, counts: Sequence[int]) -> Tensor:
        """Join the rows of all ranks, one rank below the other. counts: how many rows each rank has, which all ranks
        know.
        """
        padded = x.new_zeros(max(counts), x.shape[1])
        padded[: len(x)] = x
        return torch.cat([piece[:count] for piece, count in zip(self._gather(padded), counts, strict=True)])

    def merge(self, x: Tensor, is_mine: Tensor) -> Tensor:
        """x [N, C], of which each row belongs to one rank: returns all rows, on every rank. is_mine: [N, 1].

        The rows of other ranks are set to -0.0. Adding -0.0 to any number, -0.0 included, leaves its bits. So this sum
        of all ranks' tensors only picks each row, in any order of addition. Unlike a gather, which would have to count
        rows, the sum never waits for the GPU.
        """
        x = torch.where(is_mine, x, -0.0)
        with self.time.of(x):
            dist.all_reduce(x, group=self.group)
        return x

    def agree(self, is_true: bool) -> bool:
        """Whether `is_true` holds on every rank. Waits for all of them."""
        device = "cuda" if dist.get_backend(self.group) == "nccl" else "cpu"
        flag = torch.tensor([int(is_true)], dtype=torch.int32, device=device)
        dist.all_reduce(flag, op=dist.ReduceOp.MIN, group=self.group)
        return bool(flag.item())

    def share_rows(self, rows: Tensor, row_ids: Iterable[int]) -> None:
        """Copy these rows of rank 0's `rows` into every rank's `rows`: [R, bytes] uint8."""
        ids = torch.as_tensor(list(row_ids), dtype=torch.long, device=rows.device)
        for part in torch.split(ids, max(1, _SHARED_BYTES // max(rows.shape[1], 1))):
            sent = rows.index_select(0, part)
            with self.time.of(sent):
                dist.broadcast(sent, group=self.group, group_src=0)
            if self.rank:
                rows.index_copy_(0, part, sent)

    def _gather(self, x: Tensor) -> list[Tensor]:
        if self.group is None:
            raise InternalError("the model was loaded for several ranks that are not connected")
        pieces = [torch.empty_like(x) for _ in range(self.size)]
        with self.time.of(x):
            dist.all_gather(pieces, x, group=self.group)
        return pieces


def split_model(model: Model, ranks: Ranks) -> dict[str, tuple[int, int, int]]:
    """Cut a model without memory down to this rank's share. Returns for each tensor that was cut: this rank's rows
    [first, stop), and how many rows the whole tensor has.
    """
    cuts: dict[str, tuple[int, int, int]] = {}
    model.ranks = ranks
    layers = [(f"model.layers.{index}", layer) for index, layer in enumerate(model.model.layers)]
    layers += [(f"mtp.{index}", layer) for index, layer in enumerate(model.mtp)]
    for name, layer in layers:
        cuts |= _split_attention(f"{name}.self_attn", layer, ranks)  # type: ignore[arg-type]
        cuts |= _split_experts(f"{name}.mlp.experts", layer, ranks)  # type: ignore[arg-type]
    return cuts


def take_share(model: Model, ranks: Ranks) -> None:
    """Cut a loaded model down to this rank's share."""
    whole = model.state_dict()
    cuts = split_model(model, ranks)
    # Copies, because views of the whole would keep it in memory.
    parts = {name: tensor[slice(*cuts[name][:2])].clone() if name in cuts else tensor for name, tensor in whole.items()}
    model.load_state_dict(parts, strict=True, assign=True)
    model.requires_grad_(False)


def cut_copies(
    copies: Iterable[Copy], cuts: Mapping[str, tuple[int, int, int]], sizes: Mapping[str, int]
) -> tuple[Copy, ...]:
    """The parts of the copies that this rank reads from files. sizes: the number of elements of each whole tensor."""
    kept: list[Copy] = []
    for copy in copies:
        if copy.target not in cuts:
            kept.append(copy)
            continue
        first_row, stop_row, num_rows = cuts[copy.target]
        row = sizes[copy.target] // num_rows
        width, source = copy.source.itemsize, copy.source
        first = max(copy.first, first_row * row)
        stop = min(copy.first + source.nbytes // width, stop_row * row)
        if first < stop:
            offset = source.offset + (first - copy.first) * width
            part = replace(source, offset=offset, nbytes=(stop - first) * width)
            kept.append(replace(copy, source=part, first=first - first_row * row))
    return tuple(kept)


def _split_attention(name: str, layer: DecoderLayer, ranks: Ranks) -> dict[str, tuple[int, int, int]]:
    attention = layer.self_attn
    linears: dict[str, nn.Linear | PackedLinear] = {"q_b_proj": attention.q_b_proj, "o_a_proj": attention.o_a_proj}
    divides = attention.num_heads % ranks.size == 0 and attention.o_groups % ranks.size == 0
    if not divides or not all(_can_cut(linear, ranks) for linear in linears.values()):
        return {}
    cuts: dict[str, tuple[int, int, int]] = {}
    for own, linear in linears.items():
        cuts |= _cut_linear(f"{name}.{own}", linear, ranks)
    cuts[f"{name}.sinks"] = (*ranks.span(attention.num_heads), attention.num_heads)
    attention.num_heads //= ranks.size
    attention.o_groups //= ranks.size
    with torch.device("meta"):
        attention.sinks = nn.Parameter(torch.empty(attention.num_heads))
    attention.ranks = ranks
    return cuts


def _can_cut(linear: nn.Linear | PackedLinear, ranks: Ranks) -> bool:
    rows = linear.form.block[0] if isinstance(linear, PackedLinear) else 1
    return linear.out_features % (ranks.size * rows) == 0


def _cut_linear(name: str, linear: nn.Linear | PackedLinear, ranks: Ranks) -> dict[str, tuple[int, int, int]]:
    """Cut one linear. `out_features` keeps the value of the whole model, because the arithmetic is probed in the whole
    model's shapes, however ranks divide it.
    """
    tensors = ("codes", "scales") if isinstance(linear, PackedLinear) else ("weight",)
    return {f"{name}.{own}": _cut_rows(linear, own, ranks) for own in tensors}


def _cut_rows(module: nn.Module, own: str, ranks: Ranks) -> tuple[int, int, int]:
    tensor: Tensor = getattr(module, own)
    num_rows = len(tensor)
    local = torch.empty(num_rows // ranks.size, *tensor.shape[1:], dtype=tensor.dtype, device="meta")
    setattr(module, own, nn.Parameter(local) if isinstance(tensor, nn.Parameter) else local)
    return (*ranks.span(num_rows), num_rows)


def _split_experts(name: str, layer: DecoderLayer, ranks: Ranks) -> dict[str, tuple[int, int, int]]:
    experts = layer.mlp.experts
    if len(experts.gate_up_proj) % ranks.size:
        return {}
    cuts: dict[str, tuple[int, int, int]] = {}
    for own in ("gate_up_proj", "down_proj"):
        stack = getattr(experts, own)
        if isinstance(stack, PackedStack):
            cuts |= {f"{name}.{own}.{each}": _cut_rows(stack, each, ranks) for each in ("codes", "scales")}
        else:
            cuts[f"{name}.{own}"] = _cut_rows(experts, own, ranks)
    experts.ranks = ranks
    return cuts
