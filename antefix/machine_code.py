"""Machine code that llvmlite makes for this processor, where llvmlite is installed. Nothing needs it: each use has a
slower way without.

Making code takes some 0.3 s, so it is made in another thread when it is first wanted. It is used if it computes test
inputs rightly.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import logging
import re
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Generic, TypeVar

if TYPE_CHECKING:
    from llvmlite import ir

Code = TypeVar("Code")


class MadeOnce(Generic[Code]):
    """Machine code of one kind, which a process makes once. Thread-safe."""

    def __init__(self, make: Callable[[], Code], log: logging.Logger, effect: str) -> None:
        """make: makes the code and tries it. Raises RuntimeError if the code is wrong. effect: what the log says if
        there is no code.
        """
        self._make = make
        self._log = log
        self._effect = effect
        self._began = not importlib.util.find_spec("llvmlite")
        self._code: Code | None = None
        self._now = functools.cache(self._made)

    def now(self) -> Code | None:
        """The code, made here if it was not made before. None if llvmlite is not installed, or if its code is wrong."""
        return self._now()

    def if_ready(self, *, begin: bool = True) -> Code | None:
        """As `now`, but made in another thread; None until it is ready. begin: whether to make it, if nobody did."""
        if begin and not self._began:
            self._began = True
            # At the end of a process no thread can be started, and none is needed.
            with contextlib.suppress(RuntimeError):
                threading.Thread(target=self._keep, name="antefix-compile").start()
        return self._code

    @contextlib.contextmanager
    def used_instead(self, code: Code | None) -> Iterator[None]:
        """In this context, everything in this process uses `code`. For tests and benchmarks."""
        before, self._began, self._code = (self._began, self._code), True, code
        try:
            yield
        finally:
            self._began, self._code = before

    def _keep(self) -> None:
        self._code = self._now()

    def _made(self) -> Code | None:
        try:
            return self._make()
        except ImportError:
            return None
        except (RuntimeError, AttributeError, OSError, ValueError, TypeError) as err:
            self._log.warning("%s: %s", self._effect, err)
            return None


def host_features() -> dict[str, bool]:
    """What this processor can do, by LLVM's names. Raises: ImportError: llvmlite is not installed."""
    import llvmlite.binding as llvm

    return dict(llvm.get_host_cpu_features())


def new_module(name: str) -> ir.Module:
    """A module for the machine that this process runs on."""
    import llvmlite.binding as llvm
    from llvmlite import ir

    module = ir.Module(name)
    module.triple = llvm.get_default_triple()
    return module


def engine_of(module: ir.Module, *, vector_bits_max: int | None = None) -> Any:
    """LLVM's engine with this module's code for this processor. The code lives as long as the engine.

    vector_bits_max: wider vectors are divided; None: into what the processor has.

    Raises:  RuntimeError, AttributeError, ...: this version of llvmlite is too old, or knows no code for this machine.
    """
    import llvmlite
    import llvmlite.binding as llvm

    if tuple(map(int, llvmlite.__version__.split(".")[:2])) < (0, 45):
        llvm.initialize()
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    target = llvm.Target.from_default_triple()
    machine = target.create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=llvm.get_host_cpu_features().flatten(), opt=3
    )
    text = str(module)
    if vector_bits_max is not None:
        # llvmlite has no call for these attributes.
        limit = f'"min-legal-vector-width"="{vector_bits_max}" "prefer-vector-width"="{vector_bits_max}"'
        text = re.sub(r"^(define .*\))", rf"\1 {limit}", text, flags=re.MULTILINE)
    parsed = llvm.parse_assembly(text)
    parsed.verify()
    engine = llvm.create_mcjit_compiler(parsed, machine)
    engine.finalize_object()
    return engine
