"""The data of the web page for a fleet, in the same form as for our own workers. Reads the router's state."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any, Final

from antefix.version import __version__
from antefix_router.fleet.engines import Engine, engine_of
from antefix_router.fleet.fleet_router import FleetRouter
from antefix_router.page.activity import Activity
from antefix_router.page.view import prefix_rows, request_rows, tenant_rows
from antefix_router.placement.workers import Worker

_NO_STORE: Final = "these workers have no Antefix store; each has its own cache"


class FleetView:
    """The data of the web page for one router."""

    def __init__(self, router: FleetRouter, activity: Activity) -> None:
        self._router = router
        self._activity = activity

    async def data(self, seconds: int) -> dict[str, Any]:
        """seconds: the length of the time series before now."""
        activity, router = self._activity, self._router
        sizes = router.engines.block_sizes
        return {
            "at": time.time(),
            "version": __version__,
            "model": ", ".join(model.name for model in router.engines.models) or "none yet",
            "arithmetic": "",
            "block_size": sizes[0],
            "policy": router.config.policy,
            "started_at": activity.started_at,
            "running": router.front.accounts.num_running,
            "refused": router.placing.counters.num_full + router.placing.counters.num_late,
            "total": asdict(activity.total),
            "over": {str(span): asdict(activity.over(span)) for span in (60, 300, 3600)},
            "series": activity.series(seconds),
            "miss_tokens": dict(activity.miss_tokens.most_common()),
            "workers": [self._worker(worker) for worker in router.workers.workers],
            "store": {"error": _NO_STORE},
            "forest": prefix_rows(router.forest, sizes[0]),
            "requests": request_rows(activity),
            "tenants": tenant_rows(activity, router.front.accounts.quotas),
        }

    def _worker(self, worker: Worker) -> dict[str, Any]:
        engine = engine_of(worker)
        return {
            "role": worker.role.value,
            "address": worker.address,
            "serving": engine.is_up and not worker.is_shunned(time.monotonic()),
            "draining": False,
            "requests": worker.num_requests,
            "tokens_queued": worker.num_tokens,
            "served": worker.num_served,
            "memory_known": engine.tells,
            "arithmetic": "",
            "setup": _said(engine),
        }


def _said(engine: Engine) -> str:
    """The text shown in place of a worker's set-up: what the engine holds, and how many of the promised hits
    it gave.
    """
    models = ", ".join(model.name for model in engine.models) or "no model"
    hits = engine.hits
    told = f"hits {hits.reported:,}, expected {hits.expected:,}, lost {hits.lost:,}"
    return f"{models}; {len(engine.index)} blocks; {told}"
