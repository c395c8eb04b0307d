"""The rules that keep `make test-fast` fast."""

import json
import sys
import time
import warnings

import pytest

from tests.on_demand import OnDemand
from tests.slow_cases import SlowTest, slow_but

pytest_rules = sys.modules["tests.conftest"]


class Item:
    nodeid = "test_x.py::test_y"

    def __init__(self, *markers):
        self.markers = markers

    def get_closest_marker(self, name):
        return name if name in self.markers else None


def test_a_fast_test_that_computes_for_long_is_named():
    with warnings.catch_warnings(action="error"):
        pytest_rules.check_fast(Item(), 4.9)
    with pytest.warns(SlowTest, match=r"test_y took 5\.1 s of processor time"):
        pytest_rules.check_fast(Item(), 5.1)


@pytest.mark.parametrize("marker", ["slow", "services", "gpu", "long"])
def test_one_that_is_marked_may(marker):
    with warnings.catch_warnings(action="error"):
        pytest_rules.check_fast(Item(marker), 50.0)
    with pytest.warns(SlowTest):
        pytest_rules.check_fast(Item("no such marker"), 50.0)


def test_the_time_that_a_package_takes_to_import_is_known(monkeypatch):
    def imported(name):
        now_s = time.process_time()
        while time.process_time() - now_s < 0.01:
            pass
        return json

    monkeypatch.setattr(pytest, "importorskip", imported)
    before_s = OnDemand.spent_s
    assert OnDemand("a large package").loads("1") == 1
    assert OnDemand.spent_s - before_s >= 0.01


def test_cases_that_stand_for_all_are_fast_and_the_others_slow():
    first, second = slow_but([1], [1, 2])
    assert first == 1 and second.values == (2,) and [mark.name for mark in second.marks] == ["slow"]
    with pytest.raises(ValueError, match="no such case"):
        slow_but([3], [1, 2])
