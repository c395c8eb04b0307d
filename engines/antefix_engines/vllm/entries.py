"""vLLM's blocks and windows of a V4 prompt, as `antefix_engines.v4_entries` compares them. Needs torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from antefix.layout import BlockLayout
from antefix.model.quant import unpack_entries
from antefix_engines.engine_layout import Part, views_of
from antefix_engines.v4_entries import Group, StoredV4
from antefix_engines.vllm.v4_pages import Kind, V4Pages

_GROUPS: Final = {Kind.CSA: Group.CSA_MAIN, Kind.HCA: Group.HCA_MAIN, Kind.KEYS: Group.INDEXER_KEYS}
_STATES: Final = {Kind.CSA_STATE: Group.OVERLAP, Kind.KEYS_STATE: Group.INDEXER_OVERLAP}


def of_vllm(own: BlockLayout, pages: V4Pages, blocks: Sequence[bytes], checkpoint: bytes) -> StoredV4:
    """Read the entries from blocks in order and the compact window after the last one, as the tier stores them.

    own: the geometry, with the FP8 format, because the entries are the same records.
    """
    rows: dict[tuple[int, Group], list[Tensor]] = {}
    for payload in blocks:
        for part, records in _joined(pages.layout.block, payload):
            kind = Kind(part.group)
            numbers = _keys(records) if kind is Kind.KEYS else unpack_entries(records, own).float()
            rows.setdefault((part.layer, _GROUPS[kind]), []).append(numbers)
    for part, records in _joined(pages.layout.checkpoint, checkpoint):
        kind = Kind(part.group)
        if kind is Kind.WINDOW:
            rows.setdefault((part.layer, Group.WINDOW), []).append(unpack_entries(records, own).float())
        else:
            # Each token has kv, then its gate; the result has all tokens' kv, then all gates.
            state = records.contiguous().view(torch.float32).view(part.num_rows, 2, -1)
            rows[part.layer, _STATES[kind]] = [state.transpose(0, 1).flatten(0, 1)]
    entries = {where: torch.cat(parts) for where, parts in rows.items()}
    for layer, group in entries:
        if group is Group.WINDOW:
            # The oldest window entry is stored but never read again.
            entries[layer, group] = entries[layer, group][1:]
    num_tokens = len(blocks) * pages.block_tokens
    # vLLM's FP8 keys are not rotated; FP4 keys, as in the releases, are.
    return StoredV4(engine="vllm", num_tokens=num_tokens, layout=own, entries=entries, computes="bfloat16")


def _joined(parts: Sequence[Part], payload: bytes) -> list[tuple[Part, Tensor]]:
    """Parts with their records. Entries and keys are stored as two parts, codes and scales, which are joined here."""
    found: list[tuple[Part, Tensor]] = []
    for part, view in views_of(memoryview(payload), tuple(parts)):
        records = torch.frombuffer(bytearray(view), dtype=torch.uint8).view(part.num_rows, -1)
        if part.record.fields[0].name == "scales":
            first, codes = found.pop()
            found.append((first, torch.cat((codes, records), 1)))
        else:
            found.append((part, records))
    return found


def _keys(records: Tensor) -> Tensor:
    """Decode a key of 128 FP8 codes and a float."""
    codes = records[:, :128].contiguous().view(torch.float8_e4m3fn).float()
    return codes * records[:, 128:].contiguous().view(torch.float32)
