"""Runs `antefix up` under other mounts, limits, users and variables, sends two requests, and stops it."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.child_environment import child_environment
from tests.gateway.scripted import MODEL

START_S = 240
# The prompt is longer than two blocks, so that the second request hits.
PROMPT = "The canary sings at midnight, and the fox answers from the hill. " * 8


@dataclass(kw_only=True)
class Place:
    """Where `antefix up` runs.

    shell: commands to run first, as root in a new mount namespace. `$DATA` is the data directory.
    wrap: the command line that runs `antefix up`.  unset: environment variables to remove.
    """

    data_dir: Path
    shell: str = ""
    wrap: Sequence[str] = ()
    variables: Mapping[str, str] = field(default_factory=dict)
    unset: Sequence[str] = ()
    flags: Sequence[str] = ()
    cwd: Path | None = None

    def command(self) -> list[str]:
        # -P: folders in the working directory shadow no package, as with an installed command.
        flags = ("--model", str(MODEL), "--http-address", "127.0.0.1:0", "--json", *self.flags)
        up = [*self.wrap, sys.executable, "-P", "-m", "antefix_console", "up", *flags]
        if not self.shell:
            return [*up, "--data-dir", str(self.data_dir)]
        script = f'set -e\n{self.shell}\nexec {shlex.join(up)} --data-dir "$DATA"'
        namespace = ["unshare", "--mount"] if os.geteuid() == 0 else []
        return [*namespace, "bash", "-c", script]

    def environment(self) -> dict[str, str]:
        data = {"DATA": os.fsdecode(self.data_dir)}
        kept = {name: value for name, value in child_environment().items() if name not in self.unset}
        return {**kept, **data, "OMP_NUM_THREADS": "1", **self.variables}


@dataclass(kw_only=True)
class Running:
    """A running deployment.  ready: the output of `up --json`."""

    ready: dict[str, Any]
    data_dir: Path

    @property
    def url(self) -> str:
        return f"http://{self.ready['http_address']}"

    def ask(self) -> tuple[str, int]:
        """Send the prompt. Returns the answer and the number of hit tokens."""
        body = {"model": MODEL.name, "prompt": PROMPT, "max_tokens": 8, "temperature": 0}
        # The request must not use a proxy from the environment.
        with httpx2.Client(timeout=120, trust_env=False) as client:
            answer = client.post(f"{self.url}/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        told = answer.json()
        return told["choices"][0]["text"], told["usage"]["prompt_tokens_details"]["cached_tokens"]

    def check_answers(self) -> None:
        cold, num_before = self.ask()
        hit, num_cached = self.ask()
        assert cold == hit and num_before == 0 and num_cached >= 256

    def command_line(self, role: str) -> list[str]:
        pid = next(each["pid"] for each in self.ready["processes"] if each["role"] == role)
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="surrogateescape").split("\0")


@contextlib.contextmanager
def up(place: Place) -> Iterator[Running]:
    """Run a deployment. It must stop with code 0 and without a traceback."""
    err_path = place.data_dir.parent / "stderr.txt"
    with err_path.open("wb") as err:
        process = subprocess.Popen(
            place.command(), env=place.environment(), stdout=subprocess.PIPE, stderr=err, cwd=place.cwd or "/"
        )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            process.wait(START_S)
            pytest.fail(f"did not start: {err_path.read_text(errors='replace')[-3000:]}")
        yield Running(ready=json.loads(line), data_dir=place.data_dir)
        process.send_signal(signal.SIGTERM)
        code = process.wait(START_S)
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(START_S)
    told = err_path.read_text(errors="replace")
    assert code == 0 and "Traceback" not in told, told[-3000:]


def refused(place: Place) -> str:
    """The error of an `up` that does not start: one line after its messages about starting."""
    where = {"env": place.environment(), "cwd": place.cwd or "/"}
    process = subprocess.run(place.command(), capture_output=True, timeout=START_S, check=False, **where)
    told = process.stderr.decode(errors="replace")
    assert process.returncode in (2, 3), (process.returncode, told)
    assert "Traceback" not in told, told
    return told.strip().splitlines()[-1]


def needs_root(*programs: str) -> None:
    """Skip the test if this is not root or a program is missing."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to mount and to become other users")
    for program in programs:
        if subprocess.run(["which", program], capture_output=True, check=False).returncode:
            pytest.skip(f"needs {program}")
    probe = ["unshare", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    if subprocess.run(probe, capture_output=True, check=False).returncode:
        pytest.skip("needs mount namespaces, which this host does not give")


def opened_to_all(*paths: str | Path) -> str:
    """Shell commands that let all users reach these directories, for a mount namespace.

    A directory above them that is closed to others, such as /root, is covered by an empty one, in which the directories
    are mounted again at their own paths.
    """
    wanted = sorted({Path(path).resolve() for path in paths})
    closed = {path: _closed_above(path) for path in wanted}
    lines = ["mount -t tmpfs -o mode=755 tmpfs /mnt"]
    for number, path in enumerate(path for path in wanted if closed[path]):
        lines += [f"mkdir /mnt/{number}", f"mount --rbind {shlex.quote(str(path))} /mnt/{number}"]
    for cover in sorted({cover for cover in closed.values() if cover}):
        lines.append(f"mount -t tmpfs -o mode=755 tmpfs {shlex.quote(str(cover))}")
    for number, path in enumerate(path for path in wanted if closed[path]):
        at = shlex.quote(str(path))
        lines += [f"(umask 022; mkdir -p {at})", f"mount --rbind /mnt/{number} {at}"]
    return "\n".join(lines)


def _closed_above(path: Path) -> Path | None:
    """The highest directory above `path`, or `path` itself, that other users may not enter."""
    return next((each for each in (*reversed(path.parents), path) if not each.stat().st_mode & 0o001), None)
