"""Keeps what a probe found, so that a worker that starts again on the same set-up does not measure for half a minute.

A file is one set-up's: its name is a hash over processor, instructions, libraries, variables, threads, the code that
computes and every shape of the model. It is believed only if it is whole and a sample of the bits is still what it was
then; anything else is as if there were no file, and the probe runs. So it can save time but never make a claim.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from antefix.model.setup import Setup

if TYPE_CHECKING:
    from antefix.model.arithmetic import Arithmetic


def key(setup: Setup, prefix: str, salt: str, steps: list[str]) -> str:
    """Names the file of one set-up."""
    parts = {"setup": asdict(setup), "prefix": prefix, "salt": salt, "steps": steps, "code": _code()}
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()


@functools.cache
def _code() -> str:
    """Of every module that computes, the kernels' included: another way to compute is another probe."""
    state = hashlib.blake2b(digest_size=16)
    kernels = importlib.util.find_spec("antefix_kernels")
    folders = [Path(__file__).parent, *map(Path, (kernels and kernels.submodule_search_locations) or ())]
    for folder in folders:
        for file in sorted(folder.glob("*.py")):
            state.update(file.read_bytes())
    return state.hexdigest()


def load(directory: str, name: str, sample: str) -> dict[str, Any] | None:
    """The fields of an `Arithmetic`; None where there is nothing to believe."""
    if not directory:
        return None
    try:
        data = json.loads((Path(directory) / f"{name}.json").read_text())
        fields = data["arithmetic"]
        if data["sample"] != sample or data["checksum"] != _checksum(fields, sample):
            return None
        for field in ("failed", "unproved"):
            fields[field] = tuple(fields[field])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return dict(fields)


def save(directory: str, name: str, sample: str, measured: Arithmetic) -> None:
    """Whole or not at all; a directory that cannot be written costs the next start its time and nothing else."""
    if not directory:
        return
    fields = asdict(measured)
    data = {"arithmetic": fields, "sample": sample, "checksum": _checksum(fields, sample)}
    with contextlib.suppress(OSError):
        Path(directory).mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=directory, delete=False) as file:
            json.dump(data, file, indent=1)
        Path(file.name).replace(Path(directory) / f"{name}.json")


def _checksum(fields: dict[str, Any], sample: str) -> str:
    return hashlib.blake2b(json.dumps([fields, sample], sort_keys=True).encode(), digest_size=16).hexdigest()
