"""Kernel tests run compiled on a card, in Triton's interpreter without a card, and are skipped without Triton."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

# Triton reads this when a kernel is defined, so it must be set before any kernel module is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    if importlib.util.find_spec("triton"):
        from tests.kernels.quick_interpreter import quicken

        quicken()


@pytest.fixture
def device() -> torch.device:
    pytest.importorskip("triton", reason="Triton is not installed")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def draw(device: torch.device) -> torch.Generator:
    """A generator of each test's inputs, the same in every run. TEST_SEED gives other inputs (tests/conftest.py)."""
    return torch.Generator(device=device).manual_seed(int(torch.randint(2**31, ())))
