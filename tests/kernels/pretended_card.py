"""A pretended Hopper card: tensors say that they are on it and hold no numbers, and kernels are compiled but never run.

Triton's own assembler compiles the kernels. So the model's own code chooses kernels, tiles and types as on a real card,
on any machine with x86-64 and Linux. Code that waits for a number from the card fails, because there are no numbers.
"""

from __future__ import annotations

import contextlib
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import triton
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.runtime._async_compile import FutureKernel
from triton.runtime.jit import JITFunction


@dataclass(slots=True)
class Compiled:
    """The compiled kernels, by name: number of launches, number of compiled forms, seconds, and the newest form.

    newest: as Triton returns it.  failures: (kernel, reason).  pending: kernels that other threads still compile.
    """

    asked: dict[str, int] = field(default_factory=dict)
    forms: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    failures: list[tuple[str, str]] = field(default_factory=list)
    newest: dict[str, Any] = field(default_factory=dict)
    pending: list[tuple[str, Any]] = field(default_factory=list)
    _seen: dict[str, list[Any]] = field(default_factory=dict)

    def add(self, name: str, made: Any, seconds: float) -> None:
        """Count a compiled kernel, if it is a new form."""
        self.newest[name] = made
        if made not in self._seen.setdefault(name, []):
            self._seen[name].append(made)
            self.forms[name] = len(self._seen[name])
            self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    def finish(self) -> None:
        """Wait for the kernels that other threads compile."""
        for name, future in self.pending:
            try:
                self.add(name, future.result(), 0.0)
            except Exception as err:
                self.failures.append((name, why(err)))
        self.pending.clear()


class _Driver:
    """A driver with the methods that Triton calls before a launch."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)


@contextlib.contextmanager
def pretended_card() -> Iterator[Compiled]:
    """Within this context, tensors made on "cuda" hold no numbers, and launches only compile."""
    found = Compiled()
    plain = JITFunction.run

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        name = kernel.__name__
        found.asked[name] = found.asked.get(name, 0) + 1
        began = time.perf_counter()
        try:
            made = plain(kernel, *args, grid=grid, warmup=True, **options)
        except Exception as err:
            found.failures.append((name, why(err)))
            return None
        if isinstance(made, FutureKernel):
            if all(made is not other for _, other in found.pending):
                found.pending.append((name, made))
        else:
            found.add(name, made, time.perf_counter() - began)
        return made

    with contextlib.ExitStack() as stack:
        triton.runtime.driver.set_active(_Driver())
        stack.callback(triton.runtime.driver.set_active, None)
        for owner, name, value in (
            (JITFunction, "run", run),
            (torch, "tensor", _empty),
            (torch.cuda, "get_device_capability", lambda *_: (9, 0)),
            (torch.cuda, "is_current_stream_capturing", lambda: False),
            (FakeTensor, "data_ptr", lambda x: x.storage_offset() * x.element_size()),
            (FakeTensor, "pin_memory", lambda x, *_: torch.empty(x.shape, dtype=x.dtype)),
            # These functions would need a device guard for CUDA, which torch without CUDA does not have.
            (FakeTensor, "__getitem__", _part_of),
            (FakeTensor, "contiguous", _contiguous),
            (FakeTensor, "__setitem__", lambda *_: None),
            (FakeTensor, "copy_", lambda x, *_, **__: x),
        ):
            stack.enter_context(_replaced(owner, name, value))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(torch.inference_mode())
        yield found


def why(err: BaseException) -> str:
    """The error, and the place outside of libraries where it was raised."""
    frames = [each for each in traceback.extract_tb(err.__traceback__) if "site-packages" not in each.filename]
    places = [f"  {each.filename}:{each.lineno} {each.line}" for each in frames[-6:]]
    return "\n".join([*places, f"  {type(err).__name__}: {str(err)[:1500]}"])


def _empty(data: Any, *, dtype: torch.dtype | None = None, device: Any = None) -> torch.Tensor:
    """In place of `torch.tensor`: a tensor without numbers."""
    known = np.asarray(data)
    return torch.empty(known.shape, dtype=dtype or torch.from_numpy(known.reshape(-1)[:0]).dtype, device=device)


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Callable[..., Any]) -> Iterator[None]:
    had, held = name in vars(owner), getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if had:
            setattr(owner, name, held)
        else:
            delattr(owner, name)


def _contiguous(x: torch.Tensor) -> torch.Tensor:
    return x if x.is_contiguous() else torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _part_of(x: torch.Tensor, index: Any) -> torch.Tensor:
    """x[index], computed by tensor operations."""
    index = index if isinstance(index, tuple) else (index,)
    for place, each in enumerate(index):
        if each is Ellipsis:
            missing = x.dim() - sum(one is not None for one in index) + 1
            index = (*index[:place], *[slice(None)] * missing, *index[place + 1 :])
            break
    dim, picked = 0, []
    for each in index:
        if each is None:
            x = x.unsqueeze(dim)
        elif isinstance(each, slice):
            if each != slice(None):
                x = torch.ops.aten.slice.Tensor(x, dim, each.start, each.stop, each.step or 1)
        elif isinstance(each, torch.Tensor | list):
            at = each if isinstance(each, torch.Tensor) else torch.empty(len(each), dtype=torch.long, device=x.device)
            picked += [None] * (dim - len(picked)) + [at]
        else:
            x = x.select(dim, int(each))
            continue
        dim += 1
    return torch.ops.aten.index.Tensor(x, picked) if picked else x
