"""Imports packages that take seconds to import, and that few tests use, when a test first uses them.

Each process of a test run collects every test file, so every process would pay for an import at a file's top.
"""

import time
from typing import Any

import pytest


class OnDemand:
    """Stands for a package. A test that uses it is skipped if the package is missing."""

    # Processor time of all imports so far, which the fast run's limit does not count.
    spent_s = 0.0

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith("_"):  # pytest inspects every object in a test file
            raise AttributeError(attribute)
        before_s = time.process_time()
        package = pytest.importorskip(self._name)
        OnDemand.spent_s += time.process_time() - before_s
        return getattr(package, attribute)


openai: Any = OnDemand("openai")
anthropic: Any = OnDemand("anthropic")
agents: Any = OnDemand("agents")
transformers: Any = OnDemand("transformers")
