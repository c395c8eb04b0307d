"""Generates `antefix/v1` from `proto/` whenever a wheel or an editable install is built; the generated package is never
committed.
"""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class GenerateProtos(BuildHookInterface):
    """Hatch calls `initialize` before it collects files."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        runpy.run_path(str(Path(self.root) / "proto" / "generate.py"), run_name="__main__")
