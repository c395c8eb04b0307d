"""Runs `antefix verify --engine NAME`: compares an engine's own cold runs with its restored ones, and plants faults.

An engine's checks are a function `findings` in the module that `CHECKS` names. The function takes a `CheckRequest` and
yields a `Finding` for each check as it is done. A planted fault ("a group of zeros") is also a check, which passes if
the comparison detected the fault. So a comparison that cannot fail is reported as a failure.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, cast

from antefix.errors import ConfigError
from antefix.extras import needs


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckRequest:
    """scratch: an empty folder for stores.  model: a model directory to check too; None: only the engine's own small
    models.
    """

    scratch: Path
    seed: int
    model: Path | None = None
    is_long: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One check. subject: the model.  check: what was tried, in a few words: "a fork in block 2".

    is_right: values that must be equal were equal; for a planted fault: it was detected.  num_cached: prompt tokens
    restored.
    told: what differed and where; empty if nothing did.
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
    """The checks of an engine. Raises: ConfigError: the engine is not supported, or its packages are not installed."""
    if engine not in CHECKS:
        raise ConfigError(f"--engine must be one of {', '.join(CHECKS)}, is {engine!r}")
    try:
        return cast("Findings", importlib.import_module(CHECKS[engine]).findings)
    except ModuleNotFoundError as err:
        raise ConfigError(needs(f"--engine {engine}", str(err.name), engine)) from err
