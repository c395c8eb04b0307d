"""V4-Flash in the layout of vLLM's own planner (`vllm_cpu/plan_flash.py`): how many bytes are stored."""

import itertools
import json
from pathlib import Path

import pytest

from antefix.store_files import codec
from antefix_engines.vllm.v4_pages import V4Pages
from tests.foreign_engines.vllm_stand_in import shape_of

PLAN = json.loads(Path(__file__).with_name("vllm_flash_plan.json").read_text())


@pytest.fixture(scope="module")
def pages():
    return V4Pages.of(shape_of(PLAN), compact=True)


def test_a_window_takes_at_most_0_17_of_what_vllm_hands_over(pages):
    handed_over = sum(row["num_window_rows"] for row in PLAN["groups"]) * PLAN["row_bytes"]
    assert (handed_over, pages.window_bytes) == (22_049_280, 3_644_416)
    assert pages.window_bytes / handed_over <= 0.17


def test_a_token_takes_at_most_1_05_of_its_useful_bytes(pages):
    useful = next(row["used_bytes"] for row in PLAN["groups"] if not row["num_window_rows"])
    assert useful == pages.block_bytes == 985_664
    # Bytes include the header and are not compressed.
    assert (pages.block_bytes + 256) / useful <= 1.05


def test_whole_windows_have_all_that_is_used_of_their_rows():
    pages = V4Pages.of(shape_of(PLAN), compact=False)
    useful = sum(row["num_window_rows"] * row["used_bytes"] for row in PLAN["groups"])
    assert pages.window_bytes == useful == 15_420_416


def test_pages_are_where_the_planner_puts_them(pages):
    for row in PLAN["groups"]:
        runs = pages.runs[row["id"]]
        assert sum(len(run.layers) * run.page_bytes for run in runs) == row["page_bytes"]
        assert sum(len(run.layers) * run.used_bytes for run in runs) == row["used_bytes"]
        taken = sorted((run.offset, run.offset + len(run.layers) * run.page_bytes) for run in runs)
        assert all(before[1] <= after[0] for before, after in itertools.pairwise(taken))


def test_the_layout_tells_the_store_every_byte(pages):
    assert codec.plan_of_block(pages.layout).payload_bytes == pages.layout.block_bytes == pages.block_bytes
    assert codec.plan_of_checkpoint(pages.layout).payload_bytes == pages.layout.checkpoint_bytes == pages.window_bytes


def test_keys_of_four_bits_are_told_from_those_of_eight():
    """With FP4 keys a page of keys is 64 x 68 bytes, padded to 4,608."""
    plan = json.loads(json.dumps(PLAN))
    plan["row_bytes"] -= 21 * (8640 - 4608)
    pages = V4Pages.of(shape_of(plan), compact=True)
    assert pages.block_bytes == 985_664 - 21 * 64 * (132 - 68)
