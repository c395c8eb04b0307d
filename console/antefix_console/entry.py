"""Where the command begins: signals are heard before anything that takes a while is imported."""

from __future__ import annotations

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
    from antefix_console.cli import main as run

    return run()


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
