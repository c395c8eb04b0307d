"""What a deployment's processes take: processor time, and memory that is theirs (PSS: pages that processes share are
divided between them)."""

from __future__ import annotations

import psutil

from antefix_console.deployment import Deployment, RoleProcess


def use_of(process: RoleProcess) -> dict[str, float]:
    """cpu_s since it began; pss_mb and rss_mb now, in MB of 10^6 bytes; of its own children as well."""
    root = psutil.Process(process.process.pid)
    found = {"cpu_s": 0.0, "pss_mb": 0.0, "rss_mb": 0.0}
    for each in (root, *root.children(recursive=True)):
        times, memory = each.cpu_times(), each.memory_full_info()
        found["cpu_s"] += times.user + times.system
        found["pss_mb"] += memory.pss / 1e6
        found["rss_mb"] += memory.rss / 1e6
    return found


def use_by_role(deployment: Deployment) -> dict[str, dict[str, float]]:
    """Each process, by its role; a second one of a role has a number behind it."""
    by_role: dict[str, dict[str, float]] = {}
    for process in deployment.processes:
        name = process.role
        number = sum(each.partition("-")[0] == name for each in by_role)
        by_role[f"{name}-{number + 1}" if number else name] = use_of(process)
    return by_role
