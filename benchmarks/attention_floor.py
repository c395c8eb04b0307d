"""The least work that attention and index scores need: the bytes that must be read, and the operations.

Shapes:  H heads of C dims, I index heads of D dims, W window, k picked entries, m and n tokens per CSA and HCA entry.

A query at position p sees W window rows in every layer. In a CSA layer it scores p / m index keys (I * D
multiply-adds each) and attends to the k best entries; in an HCA layer it attends to p / n entries. Attending to an
entry takes 2 * H * C multiply-adds: one product for the score and one for the sum. A chunk of n tokens counts as n
queries at the chunk's middle position.
"""

from __future__ import annotations

from dataclasses import dataclass

from antefix.layout import KVFormat, LayerKind, entry_record, key_record
from antefix.model import ModelConfig


@dataclass(frozen=True, slots=True)
class Work:
    """nbytes: bytes of KV, each read once.  operations: a multiply-add counts as two."""

    nbytes: float
    operations: float


def attention_work(config: ModelConfig, *, context: int, num_tokens: int = 1, num_sequences: int = 1) -> Work:
    """The work of `num_tokens` new tokens in each of `num_sequences` sequences, each after `context` earlier tokens."""
    geometry = config.geometry
    entry_bytes, key_bytes = (make(geometry, KVFormat.FP8).nbytes for make in (entry_record, key_record))
    middle = context + (num_tokens + 1) / 2
    seen = min(geometry.window, middle)
    nbytes = operations = 0.0
    for kind in geometry.layers:
        attended, keys, read = seen, 0.0, 0.0
        if kind is LayerKind.CSA:
            keys = middle / geometry.csa_ratio
            attended += min(keys, config.index_topk)
            # A chunk's queries may pick different entries. Together they pick no more than all entries.
            read = min(keys, config.index_topk * num_tokens)
        elif kind is LayerKind.HCA:
            attended += middle / geometry.hca_ratio
            read = middle / geometry.hca_ratio
        nbytes += (geometry.window + read) * entry_bytes + keys * key_bytes
        scores = keys * config.index_num_heads * geometry.indexer_dim
        operations += 2 * num_tokens * (2 * attended * config.num_heads * geometry.head_dim + scores)
    return Work(nbytes=nbytes * num_sequences, operations=operations * num_sequences)
