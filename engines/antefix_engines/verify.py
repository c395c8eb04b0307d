"""What `antefix verify --engine NAME` runs: an engine's own cold runs against its restored ones, with planted faults.

An engine's checks are a function `findings` in the module that `CHECKS` names: it takes a `CheckRequest` and yields a
`Finding` for each thing that it tried, as it goes. A planted fault ("a group of zeros") is a finding as well: right if
the comparison saw it. So a comparison that cannot fail shows as a failure.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, cast

from antefix.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckRequest:
    """scratch: an empty folder for stores.  model: a checkpoint to check too, or None: the engine's own small ones."""

    scratch: Path
    seed: int
    model: Path | None = None
    is_long: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that was tried. subject: which model.  check: what of it, in a few words: "a fork in block 2".

    is_right: equal where it must be, or, of a planted fault, seen.  num_cached: of the prompt's tokens, restored.
    told: what differed and where; empty where nothing did.
    """

    subject: str
    check: str
    is_right: bool
    is_planted: bool = False
    num_tokens: int = 0
    num_cached: int = 0
    told: str = ""


Findings = Callable[[CheckRequest], Iterator[Finding]]
CHECKS: Final = {
    "transformers": "antefix_engines.transformers.check",
    "vllm": "antefix_engines.vllm.check",
}


def findings_of(engine: str) -> Findings:
    """The checks of an engine.  Raises:  ConfigError: not an engine of ours, or its packages are not installed."""
    if engine not in CHECKS:
        raise ConfigError(f"--engine must be one of {', '.join(CHECKS)}, is {engine!r}")
    try:
        return cast("Findings", importlib.import_module(CHECKS[engine]).findings)
    except ModuleNotFoundError as err:
        raise ConfigError(f"--engine {engine} needs {err.name}: pip install 'antefix[{engine}]'") from err
