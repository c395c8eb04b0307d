"""Finds operations that would make the host wait for a card, on a machine without a card."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# Operations that read numbers from a card or send numbers to it, and so wait for it.
WAITS = {"_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "unique", "_unique2", "lift_fresh",
         "bincount", "equal", "item"}  # fmt: skip


class Watched(TorchDispatchMode):
    """Counts torch's operations except views, and refuses those that would wait for a card.

    uploads: whether host arrays may be uploaded, as `antefix.model.host_rows.upload` does without waiting.
    """

    def __init__(self, *, uploads: bool = False) -> None:
        super().__init__()
        self._refused = WAITS - {"lift_fresh"} if uploads else WAITS
        self.counts: Counter[str] = Counter()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # PyTorch's compiler is not used here, and importing it takes seconds.
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        assert name not in self._refused, name
        if name in ("index", "index_put", "index_put_"):
            assert all(i is None or i.dtype not in (torch.bool, torch.uint8) for i in args[1]), f"{name} by a mask"
        if not func.is_view:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))
