"""Measures processor time and memory of a deployment's processes (PSS: shared pages are divided between the processes
that share them).
"""

from __future__ import annotations

import psutil

from antefix_console.deployment import Deployment, RoleProcess


def use_of(process: RoleProcess) -> dict[str, float]:
    """A process' cpu_s since its start, and its pss_mb and rss_mb now (MB of 10^6 bytes), including its children."""
    root = psutil.Process(process.process.pid)
    found = {"cpu_s": 0.0, "pss_mb": 0.0, "rss_mb": 0.0}
    for each in (root, *root.children(recursive=True)):
        times, memory = each.cpu_times(), each.memory_full_info()
        found["cpu_s"] += times.user + times.system
        found["pss_mb"] += memory.pss / 1e6
        found["rss_mb"] += memory.rss / 1e6
    return found


def use_by_role(deployment: Deployment) -> dict[str, dict[str, float]]:
    """The use of each process by role. The name of a role's second process ends in a number."""
    by_role: dict[str, dict[str, float]] = {}
    for process in deployment.processes:
        name = process.role
        number = sum(each.partition("-")[0] == name for each in by_role)
        by_role[f"{name}-{number + 1}" if number else name] = use_of(process)
    return by_role
