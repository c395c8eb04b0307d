"""Makes Triton's interpreter twice as fast without changing a result: it no longer repeats what never changes.

Half of the time of an interpreted kernel goes into four things, which are left out or remembered here:

- The interpreter repeats each integer operation in 64 bits to find an overflow. It then drops what it found, because
  its debug mode is off.
- Each call of a function within a kernel looks through all members of `triton.language` for what to patch.
- Each operation builds a table of all dtypes to look up one.
- Each operation builds the shape of its result, in several wrappers.

All of this is private to Triton, so other versions than the pinned one keep their own speed.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from typing import Any

import triton
import triton.language as tl
from triton.runtime import interpreter

VERSION = "3.9."


class PatchedOnce:
    """Replaces `interpreter._patch_lang`: while a kernel runs, patches what a function sees only if it is not patched.

    When a launch ends and restores its scope, all patches count as gone.
    """

    def __init__(self, patch: Any) -> None:
        self.num_patches = 0
        self._patch = patch
        self._patched: set[tuple[int, ...]] = set()
        self._sees = functools.cache(self._modules_seen)

    @staticmethod
    def _modules_seen(function: Any) -> tuple[int, ...]:
        modules = [value for value in function.__globals__.values() if inspect.ismodule(value)]
        return tuple(sorted(id(module) for module in modules if module in (tl, tl.core)))

    def __call__(self, function: Any) -> Any:
        seen = self._sees(function)
        if seen in self._patched:
            return interpreter._LangPatchScope()
        scope = self._patch(function)
        restore = scope.restore
        self._patched.add(seen)
        self.num_patches += 1

        def end() -> None:
            self._patched.clear()
            restore()

        scope.restore = end
        return scope


class KnownDtypes:
    """Replaces `interpreter._get_np_dtype`: the NumPy dtype of a scalar or block type, by the scalar's name."""

    def __init__(self, find: Any) -> None:
        self._find = find
        self._known: dict[str, Any] = {}

    def __call__(self, dtype: Any) -> Any:
        name = (dtype.element_ty if isinstance(dtype, tl.block_type) else dtype).name
        found = self._known.get(name)
        if found is None:
            found = self._known[name] = self._find(dtype)
        return found


class KnownShapes:
    """Replaces the `__init__` of block types and tensors: what only depends on the shape is made once per shape."""

    def __init__(self, init: Any, own: tuple[str, ...]) -> None:
        """own: the attributes that are not shared between two objects of the same shape and dtype."""
        self._init, self._own = init, own
        self._known: dict[Any, dict[str, Any]] = {}

    def of_block_type(self, made: Any, element_ty: Any, shape: Any) -> None:
        self._fill(made, (element_ty.name, *map(_integer, shape)), element_ty, shape, element_ty=element_ty)

    def of_tensor(self, made: Any, handle: Any, type: Any) -> None:
        key = tuple(map(_integer, type.shape)) if type.is_block() else ()
        self._fill(made, key, handle, type, handle=handle, type=type, dtype=type.scalar)

    def _fill(self, made: Any, key: Any, *args: Any, **own: Any) -> None:
        known = self._known.get(key)
        if known is None:
            self._init(made, *args)
            self._known[key] = {name: value for name, value in vars(made).items() if name not in self._own}
        else:
            made.__dict__ |= known
            made.__dict__ |= own


def _integer(size: Any) -> Any:
    return size.value if isinstance(size, tl.constexpr) else size


def quicken() -> None:
    """Make the interpreter of this process faster. A second call changes nothing."""
    if not triton.__version__.startswith(VERSION) or isinstance(interpreter._patch_lang, PatchedOnce):
        return
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=builder.options.debug)
    interpreter._patch_lang = PatchedOnce(interpreter._patch_lang)
    interpreter._get_np_dtype = KnownDtypes(interpreter._get_np_dtype)
    block_types = KnownShapes(tl.block_type.__init__, ("element_ty",))
    tensors = KnownShapes(tl.tensor.__init__, ("handle", "type", "dtype"))
    tl.block_type.__init__ = lambda self, element_ty, shape: block_types.of_block_type(self, element_ty, shape)
    tl.tensor.__init__ = lambda self, handle, type: tensors.of_tensor(self, handle, type)
