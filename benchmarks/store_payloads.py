"""Blocks and checkpoints of V4 models, made by the real packing path from Gaussian vectors, for benchmarks/store.py."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from antefix.layout import BlockLayout, KVFormat, KVGeometry, LayerKind
from antefix.model import quant

# DeepSeek-V4-Flash: 2 window layers, then CSA and HCA in turn; V4-Pro: 2 HCA layers, then CSA and HCA in turn.
FLASH_LAYERS = (LayerKind.WINDOW,) * 2 + tuple(LayerKind.HCA if i % 2 else LayerKind.CSA for i in range(41))
PRO_LAYERS = (LayerKind.HCA,) * 2 + tuple(LayerKind.HCA if i % 2 else LayerKind.CSA for i in range(59))
# The number of different blocks that are packed. Further blocks repeat these, each with different first bytes.
NUM_PACKED = 8


def layout_of(model: str) -> BlockLayout:
    """`model`: "flash" or "pro"."""
    geometry = KVGeometry(
        layers={"flash": FLASH_LAYERS, "pro": PRO_LAYERS}[model],
        head_dim=512,
        rope_dim=64,
        indexer_dim=128,
        csa_ratio=4,
        hca_ratio=128,
        window=128,
    )
    return BlockLayout(geometry=geometry, kv_format=KVFormat.FP8)


def pack_block(layout: BlockLayout, generator: torch.Generator) -> npt.NDArray[np.uint8]:
    """One block's payload, packed part by part as the model does."""
    payload = np.empty(layout.block_bytes, np.uint8)
    for part in layout.parts:
        width = quant.width_of(part, layout)
        # Channels differ in scale, as in trained models.
        scale = torch.exp(0.5 * torch.randn(width, generator=generator))
        vectors = scale * torch.randn(part.num_rows, width, generator=generator)
        records = quant.pack(part.kind, vectors, layout)
        payload[part.offset : part.offset + part.nbytes] = records.contiguous().view(-1).numpy()
    return payload


def blocks(layout: BlockLayout, num_blocks: int) -> npt.NDArray[np.uint8]:
    """[num_blocks, block_bytes] uint8."""
    generator = torch.Generator().manual_seed(7)
    packed = [pack_block(layout, generator) for _ in range(min(NUM_PACKED, num_blocks))]
    out = np.empty((num_blocks, layout.block_bytes), np.uint8)
    for number in range(num_blocks):
        out[number] = packed[number % len(packed)]
        out[number, :8] = np.frombuffer(np.uint64(number).tobytes(), np.uint8)
    return out


def pool_like(payloads: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Zeros of the same shape, aligned as in a worker's pool: to 64 bytes.

    numpy aligns large arrays to 16 bytes only. Where a buffer lies 1 to 31 bytes after its source, modulo 4,096, the
    kernel copies at a third of its speed, and it depends on chance which reader this hits.
    """
    return torch.zeros(payloads.shape, dtype=torch.uint8).numpy()
