"""Records how a file of figures was made: commit, date, machine, load, command, versions."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any


def about(*packages: str) -> dict[str, Any]:
    """This function must be called when the measurement ends, because it records the machine's load of the last
    minutes.

    packages: the packages whose versions affect the figures. On a machine that has a copy of the files but no
    repository, the environment variable COMMIT names the commit.
    """
    call = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    commit = subprocess.run(call, capture_output=True, text=True, check=False).stdout.strip() or os.environ.get(
        "COMMIT", ""
    )
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    return {
        "commit": commit,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{_cards()}{platform.machine()}, {os.cpu_count()} cores, load {load} (1, 5 and 15 minutes)",
        "command": " ".join(["python", *_relative(sys.argv)]),
        "versions": {"python": platform.python_version(), **{name: metadata.version(name) for name in packages}},
    }


def _cards() -> str:
    """The GPUs of this machine; none if the benchmark never imported torch."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return ""
    names = [torch.cuda.get_device_name(card) for card in range(torch.cuda.device_count())]
    return f"{len(names)} {names[0]}; " if len(set(names)) == 1 else f"{', '.join(names)}; "


def write(file: Path, record: dict[str, Any], *packages: str) -> None:
    """Write a file with the run's figures, and with the facts about the run that `about` returns."""
    file.write_text(json.dumps({**about(*packages), **record}, indent=1) + "\n")


def _relative(argv: list[str]) -> list[str]:
    root = f"{Path(__file__).resolve().parents[1]}/"
    return [arg.removeprefix(root) for arg in argv]
