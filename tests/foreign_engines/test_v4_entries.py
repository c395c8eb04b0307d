"""Antefix's model and transformers run one V4 checkpoint and prompt, and their stored entries are compared."""

import dataclasses

import pytest
import torch

from antefix.layout import KVFormat
from antefix_engines.transformers.small_models import write_v4
from antefix_engines.v4_entries import Group, compare
from antefix_engines.v4_runs import antefix_entries, transformers_entries

PROMPT = [(7 * i * i + 3 * i) % 1024 for i in range(2 * 128 + 5)]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("v4")
    model = write_v4(folder / "model")
    made = {str(kv_format): antefix_entries(model, PROMPT, kv_format) for kv_format in (KVFormat.FLOAT32, KVFormat.FP8)}
    made["transformers"] = transformers_entries(model, PROMPT, folder / "store")
    torch.set_num_threads(before)
    return made


def test_unrounded_entries_differ_by_the_order_of_sums_alone(stored):
    found = compare(stored["float32"], stored["transformers"])
    assert len(found) == 14 and {each.group for each in found} == set(Group)
    assert {each.why for each in found} == {"the same sums in another order"}
    assert sum(each.num_rows for each in found) == 5 * 127 + 2 * 2 * 64 + 2 + 2 * 2 * 8


def test_fp8_entries_are_transformers_numbers_rounded(stored):
    """In the first layer, below which nothing is rounded, all but 1 in 100 numbers agree. Above, rounding adds up."""
    found = compare(stored["fp8"], stored["transformers"])
    assert all(each.is_explained for each in found)
    first = next(each for each in found if each.layer == 0)
    assert first.share_rounded > 0.99 and "rounded alike" in first.why and first.num_equal == 0
    states = [each for each in found if each.group in (Group.OVERLAP, Group.INDEXER_OVERLAP)]
    assert {each.why for each in states} == {"not rounded, but computed from rounded KV in the layers below"}


def test_an_engine_equals_itself(stored):
    assert {each.why for each in compare(stored["fp8"], stored["fp8"])} == {"equal to the bit"}


@pytest.mark.parametrize("ours", ["float32", "fp8"])
@pytest.mark.parametrize("fault", ["zeros", "shifted", "mirrored"])
@pytest.mark.parametrize(
    "where", [(2, Group.CSA_MAIN), (2, Group.INDEXER_KEYS), (3, Group.HCA_MAIN), (1, Group.WINDOW)]
)
def test_another_computation_is_told_from_rounding(stored, ours, fault, where):
    theirs = stored["transformers"]
    rows = theirs.entries[where]
    wrong = {
        "zeros": torch.zeros_like(rows),
        "shifted": rows.roll(1, 0),
        "mirrored": rows.flip(-1),
    }[fault]
    changed = dataclasses.replace(theirs, entries={**theirs.entries, where: wrong})
    (found,) = (each for each in compare(stored[ours], changed) if not each.is_explained)
    assert (found.layer, found.group) == where and found.why.startswith("another computation")


def test_engines_that_lack_a_group_are_no_comparison(stored):
    theirs = stored["transformers"]
    rest = {where: rows for where, rows in theirs.entries.items() if where != (0, Group.WINDOW)}
    with pytest.raises(ValueError, match="window"):
        compare(stored["fp8"], dataclasses.replace(theirs, entries=rest))
