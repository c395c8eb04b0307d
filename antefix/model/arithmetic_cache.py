"""Saves the results of a probe, so that a worker that restarts on the same set-up need not measure for half a minute.

Each file of saved results belongs to one set-up: its name is a hash over processor, instructions, libraries, variables,
threads, the code that computes and every shape of the model. A file of saved results is used only if it is complete and
a sample of the bits is still the same as when it was written. Otherwise the probe runs as if there were no saved file.
So a saved file can only save time.
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
    """The name of the file of saved results for one set-up."""
    parts = {"setup": asdict(setup), "prefix": prefix, "salt": salt, "steps": steps, "code": _code()}
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()


@functools.cache
def _code() -> str:
    """A hash over the source of every module that computes, kernels included: changed code needs a new probe."""
    state = hashlib.blake2b(digest_size=16)
    kernels = importlib.util.find_spec("antefix_kernels")
    folders = [Path(__file__).parent, *map(Path, (kernels and kernels.submodule_search_locations) or ())]
    for folder in folders:
        for file in sorted(folder.glob("*.py")):
            state.update(file.read_bytes())
    return state.hexdigest()


def load(directory: str, name: str, sample: str) -> dict[str, Any] | None:
    """The fields of a saved `Arithmetic`; None if there is no saved file that may be used."""
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
    """Write either the whole file or nothing. If the directory cannot be written, the next start has to probe again."""
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
