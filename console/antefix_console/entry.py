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
_HEARD: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD)


def main() -> int:
    """Run one command; returns its exit code."""
    hear_signals(sys.argv[1:])
    if _is_service(sys.argv[1:]) and not _has_directory():
        sys.stderr.write("antefix: the directory that this was started in is gone; start it in another one\n")
        return 2
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
    if not ended_with:
        return
    try:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
    except OSError:
        # Python tries again, and says what is wrong.
        return
    os._exit(ended_with[0])


def hear_signals(args: list[str]) -> None:
    """SIGHUP ends no service: a terminal that closes, or an operator who means `reload`, must not stop a deployment.
    Routers read tenants and rate cards again then; certificates, keys and secrets are read again when they change.

    What started us may have blocked or ignored signals, which a process inherits: then a stop would not be heard, and
    it would not show how a role ended.

    As PID 1 of a container, signals without a handler are dropped: a stop that comes while we import must not be.
    """
    if _is_service(args):
        # Inherited by the roles that `antefix up` starts, from their first moment on.
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _HEARD)
    if os.getpid() == 1:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(_STOPPED))


def _is_service(args: list[str]) -> bool:
    return next((arg for arg in args if not arg.startswith("-")), "") in _SERVICES


def _has_directory() -> bool:
    """Libraries look for their files from there, and say something else where it is gone."""
    try:
        os.getcwd()  # noqa: PTH109 - before anything is imported
    except OSError:
        return False
    return True
