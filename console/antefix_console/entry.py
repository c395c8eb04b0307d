"""The command's entry point: installs signal handlers before it imports anything that takes long."""

from __future__ import annotations

import atexit
import gc
import os
import signal
import sys
from typing import Final

# Exit codes that shells report for a process that one of these signals ended.
_STOPPED: Final = 128 + signal.SIGTERM
_INTERRUPTED: Final = 128 + signal.SIGINT
_SERVICES: Final = ("serve", "up")
_HEARD: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD)


def main() -> int:
    """Run one command. Returns its exit code."""
    hear_signals(sys.argv[1:])
    # gRPC's own lines about closed idle connections look like faults, and are no JSON in a log of JSON.
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    if _is_service(sys.argv[1:]) and not _has_directory():
        sys.stderr.write("antefix: the directory that this was started in is gone; start it in another one\n")
        return 2
    ended_with: list[int] = []
    # Exit functions run in reverse order, so this one runs last.
    atexit.register(_end_at_once, ended_with)
    # Garbage collection takes a tenth of torch's import time and finds nothing; cli.py turns it on again.
    gc.disable()
    try:
        from antefix_console.cli import main as run
    except KeyboardInterrupt:
        return _INTERRUPTED
    ended_with.append(run())
    return ended_with[0]


def _end_at_once(ended_with: list[int]) -> None:
    """End the process without Python's cleanup, which takes half a second of a core once torch is loaded.

    ended_with: the exit code of a command that ran to its end; empty otherwise, and then Python exits as usual.
    """
    if not ended_with:
        return
    try:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
    except OSError:
        # Let Python flush again at its usual exit and report the error.
        return
    os._exit(ended_with[0])


def hear_signals(args: list[str]) -> None:
    """Set how the process handles signals.

    SIGHUP ends no service: a closed terminal, or an operator who wants a reload, must not stop a deployment. Routers
    read tenants and rate cards again on SIGHUP. Certificates, keys and secrets are read again when their files change.

    A process inherits blocked and ignored signals from its parent. Blocked and ignored signals are reset here:
    otherwise a stop would not arrive, and the way in which a service ended would not be known.

    As PID 1 of a container, a process drops signals that have no handler. A stop that comes while modules are imported
    must not be dropped.
    """
    if _is_service(args):
        # The roles that `antefix up` starts inherit this from their first moment on.
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _HEARD)
    if os.getpid() == 1:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(_STOPPED))


def _is_service(args: list[str]) -> bool:
    return next((arg for arg in args if not arg.startswith("-")), "") in _SERVICES


def _has_directory() -> bool:
    """Whether the working directory exists. Without the current directory, libraries fail to find files, with
    misleading messages.
    """
    try:
        os.getcwd()  # noqa: PTH109 - before anything is imported
    except OSError:
        return False
    return True
