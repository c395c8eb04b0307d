"""Imports packages that take seconds to import, and that few tests use, when a test first uses them.

Each process of a test run collects every test file, so every process would pay for an import at a file's top.
"""

import time
from typing import Any

import pytest


class OnDemand:
    """Stands for a package. A test that touches it is skipped where the package is missing."""

    # Processor time of all imports so far: the fast run's limit leaves it out.
    spent_s = 0.0

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith("_"):  # pytest looks at what a test file holds
            raise AttributeError(attribute)
        before_s = time.process_time()
        package = pytest.importorskip(self._name)
        OnDemand.spent_s += time.process_time() - before_s
        return getattr(package, attribute)


openai: Any = OnDemand("openai")
anthropic: Any = OnDemand("anthropic")
agents: Any = OnDemand("agents")
transformers: Any = OnDemand("transformers")
