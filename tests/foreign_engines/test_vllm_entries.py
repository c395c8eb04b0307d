"""Entries are read from vLLM's payloads, to compare them with other engines' entries."""

import numpy as np
import pytest
import torch

from antefix.layout import BlockLayout, KVFormat, KVGeometry
from antefix.model.quant import pack_entries
from antefix_engines.v4_entries import Group, compare
from antefix_engines.vllm.check_models import V4
from antefix_engines.vllm.entries import of_vllm
from antefix_engines.vllm.shape import Shape
from antefix_engines.vllm.v4_pages import Kind, V4Pages
from tests.foreign_engines import vllm_stand_in


@pytest.fixture(scope="module")
def own():
    return BlockLayout(geometry=KVGeometry.from_config(V4.config), kv_format=KVFormat.FP8)


@pytest.fixture(scope="module")
def pages():
    spec = vllm_stand_in.TieringOffloadingSpec(vllm_stand_in.config_of())
    return V4Pages.of(Shape.of(spec, spec.kv_bytes_per_chunk), compact=True)


def rows_with(pages, own, numbers):
    """Host rows whose pages of entries hold these numbers: [layers, entries, head dim] by kind."""
    rows = {}
    for group, runs in pages.runs.items():
        row = np.zeros(pages.shape.cell_bytes, np.uint8)
        for run in runs:
            if run.kind in numbers:
                records = pack_entries(numbers[run.kind].flatten(0, 1), own).view(len(run.layers), -1, 584).numpy()
                page = np.concatenate(
                    (
                        records[:, :, :576].reshape(len(run.layers), -1),
                        records[:, :, 576:].reshape(len(run.layers), -1),
                    ),
                    1,
                )
                run.used(row)[...] = page
        rows[group] = row
    return rows


def test_entries_are_read_where_vllm_has_them(own, pages):
    generator = torch.Generator().manual_seed(0)
    numbers = {
        Kind.CSA: torch.randn(2, 64, 512, generator=generator),
        Kind.HCA: torch.randn(1, 2, 512, generator=generator),
    }
    row = rows_with(pages, own, numbers)[pages.blocks.id]
    block = b"".join(run.used(row).tobytes() for run in pages.runs[pages.blocks.id])
    found = of_vllm(own, pages, [block, block], bytes(pages.window_bytes))
    assert found.num_tokens == 512 and {group for _, group in found.entries} == set(Group)
    for layer, index in ((2, 0), (4, 1)):
        mine = found.entries[layer, Group.CSA_MAIN]
        assert mine.shape == (128, 512) and (mine[:64] - numbers[Kind.CSA][index]).abs().max() < 0.2
        assert torch.equal(mine[:64], mine[64:])
    assert (found.entries[3, Group.HCA_MAIN][:2] - numbers[Kind.HCA][0]).abs().max() < 0.2
    assert found.entries[0, Group.WINDOW].shape == (127, 512)
    assert found.entries[2, Group.OVERLAP].shape == (8, 512)
    assert all(each.why == "equal to the bit" for each in compare(found, found))
