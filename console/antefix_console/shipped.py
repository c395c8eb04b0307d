"""The model and documents shipped with Antefix: next to this file in an installed package, else in the checkout."""

from __future__ import annotations

from pathlib import Path
from typing import Final

_INSTALLED = Path(__file__).parent / "shipped"
# In a checkout, the directory that also has the benchmarks.
CHECKOUT: Final = Path(__file__).resolve().parents[2]
SHIPPED: Final = _INSTALLED if _INSTALLED.is_dir() else CHECKOUT
MODEL: Final = SHIPPED / "models" / "antefix-tiny"
