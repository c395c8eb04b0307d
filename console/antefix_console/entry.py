"""Where the command begins: signals are heard before anything that takes a while is imported."""

from __future__ import annotations

import atexit
import gc
import os
import signal
import sys
from typing import Final

# What stops a service; the exit code that shells give for it.
_STOPPED: Final = 128 + signal.SIGTERM
_SERVICES: Final = ("serve", "up")


def main() -> int:
    """Run one command; returns its exit code."""
    hear_signals(sys.argv[1:])
    ended_with: list[int] = []
    # The first to be registered is the last to run.
    atexit.register(_end_at_once, ended_with)
    # A tenth of the time that torch takes to import, without finding any; cli.py puts it on again.
    gc.disable()
    from antefix_console.cli import main as run

    ended_with.append(run())
    return ended_with[0]


def _end_at_once(ended_with: list[int]) -> None:
    """Leave it to the system to take the process apart: with torch in it, Python takes half a second of a core.

    ended_with: the exit code of a command that ran to its end; of any other, Python knows what it says.
    """
    if ended_with:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(ended_with[0])


def hear_signals(args: list[str]) -> None:
    """SIGHUP ends no service: a terminal that closes, or an operator who means `reload`, must not stop a deployment.
    Routers read tenants and rate cards again then; certificates, keys and secrets are read again when they change.

    As PID 1 of a container, signals without a handler are dropped: a stop that comes while we import must not be.
    """
    if next((arg for arg in args if not arg.startswith("-")), "") in _SERVICES:
        # Inherited by the roles that `antefix up` starts, from their first moment on.
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    if os.getpid() == 1:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(_STOPPED))
