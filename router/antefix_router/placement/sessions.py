"""The worker of each conversation's last turn, as a hint for its next turn. The memory is bounded; the oldest entries
are dropped first.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

import xxhash

from antefix_router.placement.workers import WorkerRole

# Each entry takes some 200 bytes.
NUM_SESSIONS_MAX: Final = 1 << 16


class Sessions:
    """Maps (tenant, session) to the address of the worker that last had the conversation, for each role. The names of
    tenant and session themselves are not stored.
    """

    def __init__(self, num_max: int = NUM_SESSIONS_MAX) -> None:
        self._num_max = num_max
        self._last: OrderedDict[tuple[int, WorkerRole], str] = OrderedDict()

    def __len__(self) -> int:
        return len(self._last)

    def last(self, tenant: str, session: str, role: WorkerRole) -> str:
        """The address of that worker; empty if the request named no session, or a new one."""
        return self._last.get((_key(tenant, session), role), "") if session else ""

    def note(self, tenant: str, session: str, role: WorkerRole, address: str) -> None:
        """Record that a request of the session was placed there."""
        if not session:
            return
        key = (_key(tenant, session), role)
        self._last[key] = address
        self._last.move_to_end(key)
        while len(self._last) > self._num_max:
            self._last.popitem(last=False)


def _key(tenant: str, session: str) -> int:
    # The length comes first, so that the names of two tenants' sessions cannot be confused.
    return xxhash.xxh3_64_intdigest(f"{len(tenant)}:{tenant}{session}".encode())
