"""What Numba lacks for kernels over torch's memory: pointers, fused multiply-adds, access to the bits of floats.

The compiler may not fuse, reorder or approximate operations here: the source alone decides a kernel's bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from antefix.model.compiled.sources import sources_digest

T = TypeVar("T")

f32 = np.float32
i32 = np.int32


@intrinsic
def fma(_context: Any, a: Any, b: Any, c: Any) -> Any:
    """a * b + c, rounded only once."""

    def build(_: Any, builder: Any, __: Any, args: Any) -> Any:
        kind = args[0].type
        function = builder.module.declare_intrinsic("llvm.fma", [kind], ir.FunctionType(kind, [kind] * 3))
        return builder.call(function, args)

    return types.float32(types.float32, types.float32, types.float32), build


@intrinsic
def rint(_context: Any, a: Any) -> Any:
    """a rounded to the nearest integer, ties to even."""

    def build(_: Any, builder: Any, __: Any, args: Any) -> Any:
        return builder.call(builder.module.declare_intrinsic("llvm.rint", [args[0].type]), args)

    return types.float32(types.float32), build


@intrinsic
def bits_of(_context: Any, a: Any) -> Any:
    def build(_: Any, builder: Any, __: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.IntType(32))

    return types.int32(types.float32), build


@intrinsic
def float_of(_context: Any, a: Any) -> Any:
    def build(_: Any, builder: Any, __: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.int32), build


@intrinsic
def _pointer(_context: Any, address: Any) -> Any:
    def build(_: Any, builder: Any, __: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], ir.IntType(8).as_pointer())

    return types.voidptr(types.int64), build


# Highest accuracy, denormals kept, errors ignored: the mode in which ATen's vml.h calls MKL's vector functions.
_VML_MODE = 0x2 | 0x00140000 | 0x100


@intrinsic
def exponentials(_context: Any, function: Any, size: Any, given: Any, made: Any) -> Any:
    """Call MKL's `vmsExp`, whose address is `function`, on `size` numbers from address `given` to address `made`."""

    def build(_: Any, builder: Any, __: Any, args: Any) -> Any:
        pointer, word = ir.FloatType().as_pointer(), ir.IntType(64)
        kind = ir.FunctionType(ir.VoidType(), [ir.IntType(32), pointer, pointer, word])
        call = builder.inttoptr(args[0], kind.as_pointer())
        count = builder.trunc(args[1], ir.IntType(32))
        given, made = (builder.inttoptr(each, pointer) for each in args[2:])
        builder.call(call, [count, given, made, ir.Constant(word, _VML_MODE)])
        return word(0)

    return types.int64(types.int64, types.int64, types.int64, types.int64), build


# With this setting division by zero gives infinity, as in torch. A branch that raises an error would keep loops from
# being vectorised.
inline = numba.njit(error_model="numpy")
plain = numba.njit(error_model="numpy")


@inline
def floats(address: int, first: int, size: int) -> Any:
    """A view of `size` float32 from number `first` on, counted from an address (`Tensor.data_ptr`).

    Such views must be indexed only with the loop's own counter. For any other index, Numba inserts a check for negative
    values, and then does not vectorise the loop.
    """
    return numba.carray(_pointer(address + 4 * first), (size,), dtype=np.float32)


@inline
def integers(address: int, first: int, size: int) -> Any:
    """The same for int64."""
    return numba.carray(_pointer(address + 8 * first), (size,), dtype=np.int64)


@inline
def octets(address: int, first: int, size: int) -> Any:
    """The same for bytes."""
    return numba.carray(_pointer(address + first), (size,), dtype=np.uint8)


def kernel(signature: str) -> Callable[[Callable[..., T]], Callable[..., T]]:
    """Compile a function for one signature; the compiled function runs without Python's global lock. The compiled code
    is cached on disk if possible.
    """

    def wrap(function: Callable[..., T]) -> Callable[..., T]:
        # Part of the cached file's name.
        function.__qualname__ += f"_{sources_digest()}"
        try:
            return numba.njit(signature, nogil=True, error_model="numpy", cache=True)(function)  # type: ignore[no-any-return]
        except RuntimeError as error:
            if "no locator available" not in str(error):
                raise
            return numba.njit(signature, nogil=True, error_model="numpy")(function)  # type: ignore[no-any-return]

    return wrap
