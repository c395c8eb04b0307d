"""The result of a check of `antefix doctor`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One check. status: "ok", "warn" (slower or weaker than it could be) or "fail" (will not work)."""

    check: str
    status: str
    detail: str
    advice: str = ""
