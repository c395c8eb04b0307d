"""Skips tests that run an engine in its own environment unless they are asked for."""

import pytest


def pytest_collection_modifyitems(config, items):
    if "engines" in (config.option.markexpr or ""):
        return
    for item in items:
        if item.get_closest_marker("engines"):
            item.add_marker(pytest.mark.skip(reason="runs an engine in its own environment: `make test-engines`"))
