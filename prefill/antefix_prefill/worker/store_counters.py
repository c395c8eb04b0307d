"""How the store behaved towards one worker: each error became a recompute and a count here."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class StoreCounters:
    """How the store behaved towards this worker since it started; each error became a recompute."""

    errors: int = 0
    refused: int = 0
    short_reads: int = 0
    pool_refused: int = 0
    last_error: str = ""
    by_kind: dict[str, int] = field(default_factory=dict)

    def note(self, err: Exception) -> None:
        self.errors += 1
        self.last_error = f"{type(err).__name__}: {err}"
        name = type(err).__name__
        self.by_kind[name] = self.by_kind.get(name, 0) + 1
