"""A process that has imported what one role imports at its start, and starts that role by forking itself.

Tests start some hundred roles, and the imports are most of what a start costs. tests/role_forks.py starts this process
and says which starts it may replace. A forked role runs the same `python -m antefix_console serve ROLE ...`, only with
its modules imported already. This process has one thread and serves nothing, so no lock or socket is shared.

    this process: "ready" once it has imported
    a test: {"args", "cwd", "umask"} with stdin, stdout, stderr, and a pipe that the role closes once it is set up
    this process: the role's pid
"""

from __future__ import annotations

import gc
import json
import os
import runpy
import socket
import sys
from pathlib import Path

REQUEST_BYTES_MAX = 1 << 17


def import_role(role: str) -> None:
    """Import what the role imports at its start, as `antefix_console.entry` does."""
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    gc.disable()
    from antefix_console.catalog import ROLES
    from antefix_console.cli import main  # noqa: F401

    ROLES[role].load()


def next_role(requests: socket.socket) -> list[str] | None:
    """Returns, in each forked role, its command line. Returns None in this process, after the last request."""
    while True:
        message, fds, _, _ = socket.recv_fds(requests, REQUEST_BYTES_MAX, 4)
        if not message:
            return None
        wanted = json.loads(message)
        if (pid := fork_orphan()) is None:
            requests.close()
            os.setsid()
            os.chdir(wanted["cwd"])
            os.umask(wanted["umask"])
            for number, fd in enumerate(fds[:3]):
                os.dup2(fd, number)
            for fd in fds:
                os.close(fd)
            return wanted["args"]
        for fd in fds:
            os.close(fd)
        requests.send(str(pid).encode())


def fork_orphan() -> int | None:
    """Fork a process whose parent ends at once, so that the test's process, as subreaper, becomes its parent. Returns
    None in the new process.
    """
    reader, writer = os.pipe()
    if (between := os.fork()) == 0:
        if (pid := os.fork()) == 0:
            os.close(reader)
            os.close(writer)
            return None
        os.write(writer, str(pid).encode())
        os._exit(0)
    os.close(writer)
    pid = int(os.read(reader, 32))
    os.close(reader)
    os.waitpid(between, 0)
    return pid


def main() -> None:
    requests = socket.socket(fileno=int(sys.argv[1]))
    import_role(sys.argv[2])
    if len(list(Path("/proc/self/task").iterdir())) > 1:
        # A fork would have none of the threads, but the locks that they hold.
        requests.send(b"threads")
        return
    requests.send(b"ready")
    args = next_role(requests)
    if args is None:
        # Python's own end takes half a second once torch is loaded.
        os._exit(0)
    if numpy_random := sys.modules.get("numpy.random"):
        # Python draws other random numbers in a fork, NumPy does not.
        numpy_random.seed()
    sys.orig_argv[:] = args
    sys.argv[:] = args[args.index("antefix_console") :]
    runpy.run_module("antefix_console", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
