"""How the processes that run one model find each other: NCCL between GPUs, gloo on a CPU, on this host alone."""

from __future__ import annotations

import datetime
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from antefix.errors import ConfigError
from antefix.model.ranks import Ranks


def device_of(rank: int, size: int, device: str) -> str:
    """The device of a rank: on GPUs, the GPU with the rank's number.

    Raises:  ConfigError: fewer GPUs are visible than ranks, or one GPU is named for all.
    """
    if torch.device(device).type != "cuda":
        return device
    if torch.device(device).index is not None:
        raise ConfigError(f"--tensor-parallel-size {size} needs that many cards: give --device cuda, not {device}")
    if torch.cuda.device_count() < size:
        raise ConfigError(
            f"--tensor-parallel-size {size} needs as many cards, but {torch.cuda.device_count()} are visible"
        )
    return f"cuda:{rank}"


def join_ranks(rank: int, size: int, device: str, *, rendezvous: Path, timeout_s: float) -> Ranks:
    """Meet the other ranks through a file. A rank that waits longer than `timeout_s` for another rank, now or in any
    later exchange, fails.

    device: this rank's own.
    """
    store = dist.FileStore(str(rendezvous), size)  # type: ignore[attr-defined]
    timeout = datetime.timedelta(seconds=timeout_s)
    where = torch.device(device)
    if where.type == "cuda":
        # This is NCCL's own variable. Multicast over NVLink needs rights that most containers lack; then NCCL fails.
        os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
        os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
        torch.cuda.set_device(where)
        dist.init_process_group("nccl", store=store, rank=rank, world_size=size, timeout=timeout, device_id=where)
        return Ranks.of_group()
    # Not torch's default process group, which the surrounding program may use itself.
    gloo: Any = dist.ProcessGroupGloo
    options = gloo._Options()
    options._devices = [gloo.create_device(interface="lo")]
    options._timeout = timeout
    return Ranks(rank=rank, size=size, group=gloo(store, rank, size, options))


def part_ranks(ranks: Ranks) -> None:
    """Leave the process group; no exchange is possible afterwards."""
    if ranks.group is not None and ranks.group is dist.group.WORLD:
        dist.destroy_process_group()
