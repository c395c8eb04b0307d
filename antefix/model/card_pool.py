"""A block pool for the kernels, which read and write its packed rows directly. A pool on a GPU keeps no decoded copies
of its rows.

Payloads enter and leave through pinned host memory (`antefix.model.host_rows`).

Memory: Memory: `num_blocks * block_bytes` on the GPU, and as much pinned memory on the host.
"""

from __future__ import annotations

import torch
from torch import Tensor

from antefix.errors import InternalError
from antefix.layout import BlockLayout, KVFormat, Part
from antefix.model.host_rows import HostRows
from antefix.model.pool import BlockPool
from antefix.model.quant import pack


class CardPool(BlockPool):
    """For TritonOps; FP8 format only. A pool belongs to one thread, like every pool; other threads may call only
    `landing`.

    On a CPU, where the kernels run in Triton's interpreter, host rows are still separate memory.
    """

    def __init__(
        self,
        layout: BlockLayout,
        num_blocks: int,
        device: str | torch.device = "cuda",
        *,
        takes_payloads: bool = True,
    ) -> None:
        if layout.kv_format is not KVFormat.FP8:
            raise InternalError(
                f"a block pool on a card holds records in the fp8 format only, not {layout.kv_format.value}"
            )
        super().__init__(layout, num_blocks, device, takes_payloads=takes_payloads)
        if takes_payloads and self._host is None:
            self._host = HostRows(self.rows)

    def decode_rows(self, block_ids: list[int]) -> None:
        """This method does nothing, because a pool on a GPU keeps no decoded copies."""

    def decoded(self, part: Part) -> Tensor:
        """Raises InternalError: a GPU pool keeps no decoded values."""
        raise InternalError("this pool of blocks keeps no decoded values of KV; read its packed records")

    def write(self, part: Part, block_ids: Tensor, row_ids: Tensor, values: Tensor) -> None:
        self.records(part)[block_ids, row_ids] = pack(part.kind, values, self.layout)

    def _decoded_part(self, part: Part) -> Tensor:
        return torch.empty(0)
