"""Pinned host memory for a pool on a GPU: payloads pass through it on their way from and to the disk.

    restore   disk -> landing(ids), pinned -> send(ids): one copy per run of neighbours -> rows on the GPU
    capture   rows on the GPU -> fetch(ids): one copy per run -> pinned rows -> disk

Apart from this copy, payloads are not copied in either direction. Memory: as many bytes of pinned memory as the pool's
rows have.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor


def upload(array: np.ndarray[Any, Any], device: torch.device) -> Tensor:
    """A copy of the array on the device. The host does not wait until the array is copied."""
    host = torch.from_numpy(array)
    if device.type != "cuda":
        return host.to(device)
    return host.pin_memory().to(device, non_blocking=True)


class HostIntegers:
    """Pinned host memory for the integers of steps, of one shape. A step's integers go to the GPU without a new pinned
    array per step. Two steps take turns, so that the host fills one array while the GPU may still read the other.
    """

    def __init__(self, device_integers: Tensor) -> None:
        self._target = device_integers
        self._is_card = device_integers.device.type == "cuda"
        shape = device_integers.shape
        self._hosts = [torch.zeros(shape, dtype=torch.int32, pin_memory=self._is_card) for _ in range(2)]
        self._arrays = [host.numpy() for host in self._hosts]
        self._copied: list[Any] = [None, None]
        self._turn = 0

    def send(self, integers: np.ndarray[Any, np.dtype[np.int32]]) -> None:
        """Copy integers to the GPU; places beyond their shape become 0. The host does not wait for this copy."""
        turn = self._turn = 1 - self._turn
        if self._copied[turn] is not None:
            self._copied[turn].synchronize()
        array = self._arrays[turn]
        if array.shape != integers.shape:
            array.fill(0)
        array[tuple(slice(size) for size in integers.shape)] = integers
        self._target.copy_(self._hosts[turn], non_blocking=True)
        if self._is_card:
            event = self._copied[turn] = self._copied[turn] or torch.cuda.Event()
            event.record(torch.cuda.current_stream(self._target.device))


class HostRows:
    """One host row for each of `rows` [num_blocks, block_bytes] uint8 on a GPU.

    After `send` or `fetch` a host row holds its block's payload until the block is written again.
    """

    def __init__(self, rows: Tensor) -> None:
        self._rows = rows
        self._is_card = rows.device.type == "cuda"
        self._host = torch.empty(rows.shape, dtype=torch.uint8, pin_memory=self._is_card)

    @property
    def memory(self) -> Tensor:
        """All host rows, [num_blocks, block_bytes] uint8."""
        return self._host

    def landing(self, block_ids: Iterable[int]) -> list[memoryview]:
        """Host memory that is to be filled with the blocks' payloads. Its present contents mean nothing."""
        # Slicing a memoryview costs a fraction of indexing an array or a tensor, and no read begins before.
        nbytes = self._host.shape[1]
        host = self._host.numpy().reshape(-1).data
        return [host[block_id * nbytes : (block_id + 1) * nbytes] for block_id in block_ids]

    def send(self, block_ids: Iterable[int]) -> None:
        """Copy payloads that have arrived in host memory to the GPU. When this method returns, the host rows may be
        filled again.
        """
        for run in _runs(block_ids):
            self._rows[run].copy_(self._host[run], non_blocking=True)
        self._wait()

    def fetch(self, block_ids: Iterable[int]) -> list[memoryview]:
        """The blocks' present payloads. Waits for the GPU once."""
        ids = list(block_ids)
        for run in _runs(ids):
            self._host[run].copy_(self._rows[run], non_blocking=True)
        self._wait()
        return self.landing(ids)

    def _wait(self) -> None:
        if self._is_card:
            torch.cuda.current_stream(self._rows.device).synchronize()


def _runs(block_ids: Iterable[int]) -> Iterator[slice]:
    """Runs of neighbouring block ids; each id appears in one run."""
    ids = sorted(set(block_ids))
    start = 0
    for i in range(1, len(ids) + 1):
        if i == len(ids) or ids[i] != ids[i - 1] + 1:
            yield slice(ids[start], ids[i - 1] + 1)
            start = i
