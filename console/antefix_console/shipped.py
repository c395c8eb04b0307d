"""The model and the documents that Antefix ships: next to this file in an installed package, else the checkout's."""

from __future__ import annotations

from pathlib import Path
from typing import Final

_INSTALLED = Path(__file__).parent / "shipped"
# Where the benchmarks are as well, if this is a checkout.
CHECKOUT: Final = Path(__file__).resolve().parents[2]
SHIPPED: Final = _INSTALLED if _INSTALLED.is_dir() else CHECKOUT
MODEL: Final = SHIPPED / "models" / "antefix-tiny"
