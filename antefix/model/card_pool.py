"""A block pool on a card: packed rows alone, and pinned host memory through which payloads come and go.

A restore reads from disk straight into `row(block_id)`, which is pinned, and `note_filled` copies the rows to the card:
no other copy on the way. The kernels read packed records, so there are no decoded mirrors.

Memory: `num_blocks * block_bytes` on the card, and as much pinned on the host.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from antefix.errors import InvalidRequest
from antefix.layout import BlockLayout, KVFormat, Part
from antefix.model.pool import BlockPool
from antefix.model.quant import pack


class CardPool(BlockPool):
    """For TritonOps; FP8 format only. Belongs to one thread, like every pool."""

    def __init__(self, layout: BlockLayout, num_blocks: int, device: str | torch.device = "cuda") -> None:
        if layout.kv_format is not KVFormat.FP8:
            raise InvalidRequest(f"a card pool holds fp8 records only, not {layout.kv_format.value}")
        super().__init__(layout, num_blocks, device)
        pinned = self.rows.device.type == "cuda"
        self._host = torch.empty(num_blocks, layout.block_bytes, dtype=torch.uint8, pin_memory=pinned)

    def row(self, block_id: int) -> memoryview:
        """The block's payload as it is now, in pinned memory. After writing into it, call `note_filled`."""
        self._host[block_id].copy_(self.rows[block_id])
        return self._host[block_id].numpy().data

    def note_filled(self, block_ids: Iterable[int]) -> None:
        """Rows were written in host memory: copy them to the card, runs of neighbours at once."""
        ids = sorted(block_ids)
        start = 0
        for i in range(1, len(ids) + 1):
            if i == len(ids) or ids[i] != ids[i - 1] + 1:
                run = slice(ids[start], ids[i - 1] + 1)
                self.rows[run].copy_(self._host[run], non_blocking=True)
                start = i
        if self.rows.device.type == "cuda":
            # The host rows may be read into again as soon as this returns.
            torch.cuda.current_stream(self.rows.device).synchronize()

    def decoded(self, part: Part) -> Tensor:
        """Raises InvalidRequest: a card pool keeps no decoded values."""
        raise InvalidRequest("a card pool keeps no decoded values; read its records")

    def write(self, part: Part, block_ids: Tensor, row_ids: Tensor, values: Tensor) -> None:
        self.records(part)[block_ids, row_ids] = pack(part.kind, values, self.layout)

    def _decoded_part(self, part: Part) -> Tensor:
        return torch.empty(0)
