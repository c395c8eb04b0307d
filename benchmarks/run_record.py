"""Records how a file of figures was made: commit, date, machine, load, command, versions, and the code that ran."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# What a file contains that can start a process. The code that other processes load is not known here.
_STARTS = re.compile(
    r"^ *(?:import|from) (?:subprocess|multiprocessing)\b|create_subprocess_|os\.fork|ProcessPool", re.MULTILINE
)


def about(*packages: str) -> dict[str, Any]:
    """This function must be called when the measurement ends, because it records the machine's load of the last
    minutes.

    packages: the packages whose versions affect the figures. On a machine that has a copy of the files but no
    repository, the environment variable COMMIT names the commit.

    Returns:  a dictionary for the record. `code` is the files that the run loaded, so that `--stale` of
    docs/generate_results.py need not look at others. It is missing if the run may have started processes.
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
        **({"code": code} if (code := loaded_code()) else {}),
    }


def loaded_code() -> list[str]:
    """The repository's files that this process has loaded, without the benchmarks themselves. Empty if one of them can
    start a process, because the files that such a process loads are not known here.
    """
    files = [getattr(module, "__file__", None) for module in list(sys.modules.values())]
    paths = {Path(file).resolve() for file in files if file and file.endswith(".py")}
    ours = sorted(path.relative_to(ROOT) for path in paths if path.is_relative_to(ROOT) and path.exists())
    ours = [path for path in ours if not path.parts[0].startswith(".")]  # environments and their packages
    if any(_STARTS.search((ROOT / path).read_text()) for path in ours if path != Path("benchmarks/run_record.py")):
        return []
    named = (_source(path.as_posix()) for path in ours if path.parts[0] != "benchmarks")
    return list(dict.fromkeys(named))


def _source(name: str) -> str:
    """The file in Git that a loaded file was generated from, or the file itself."""
    return re.sub(r"^(antefix/v1/\w+?)_pb2(?:_grpc)?\.pyi?$", r"proto/\1.proto", name)


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
    return [arg.removeprefix(f"{ROOT}/") for arg in argv]
