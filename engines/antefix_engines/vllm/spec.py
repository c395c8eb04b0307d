"""`AntefixSpec`: vLLM's tiered offloading, with hits that end at the ends of blocks, which keeps V4's windows small.

This class is optional: with vLLM's own `TieringOffloadingSpec` the tier stores windows with all states, which are right
for any hit.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.kv_offload.base import LookupResult, ReqContext
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec

from antefix_engines.vllm.aligned import POSITIONS, AlignedLookup
from antefix_engines.vllm.shape import Shape
from antefix_engines.vllm.tier import ALIGNED
from antefix_engines.vllm.v4_pages import V4Pages


class AntefixSpec(TieringOffloadingSpec):  # type: ignore[misc]
    """Named by `spec_name`, with `"spec_module_path": "antefix_engines.vllm.spec"`."""

    def get_manager(self) -> Any:
        if self._manager is None:
            pages = V4Pages.of(Shape.of(self, self.kv_bytes_per_chunk), compact=True)
            # Without the end positions of a request's keys, the rule cannot be applied; the tier then stores whole
            # windows.
            is_kept = pages is not None and hasattr(ReqContext(req_id=""), POSITIONS)
            setattr(self, ALIGNED, is_kept)
            manager = super().get_manager()
            if pages is not None and is_kept:
                manager.lookup = AlignedLookup(manager.lookup, pages, LookupResult.MISS)
        return self._manager
