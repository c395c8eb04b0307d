"""Parts of the code of products' tiles: one chain of fused multiply-adds per sum, in the order of the addends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import cgutils

WORD, NUMBER, INDEX = ir.IntType(64), ir.FloatType(), ir.IntType(32)


def at(builder: Any, base: Any, place: Any, kind: Any) -> Any:
    """The address of a `kind` that begins `place` numbers after `base`."""
    return builder.bitcast(builder.gep(base, [place]), kind.as_pointer())


def everywhere(builder: Any, address: Any, vector: Any) -> Any:
    """A vector that holds the number at an address in each lane."""
    one = builder.insert_element(ir.Constant(vector, ir.Undefined), builder.load(address), INDEX(0))
    return builder.shuffle_vector(one, one, ir.Constant(ir.VectorType(INDEX, vector.count), [0] * vector.count))


def multiply_add(builder: Any, vector: Any) -> Any:
    # llvmlite's own declaration of intrinsics knows no vectors.
    kind = ir.FunctionType(vector, [vector] * 3)
    return cgutils.get_or_insert_function(builder.module, kind, f"llvm.fma.v{vector.count}f32")


def sum_up(
    builder: Any, addends: Any, vector: Any, count: int, step: Callable[[Any, list[Any]], list[Any]]
) -> list[Any]:
    """Run `step(k, sums)`, which returns new sums, for each addend k from 0 on; all `count` sums start at 0."""
    before, loop, done = builder.block, *(builder.append_basic_block(name) for name in ("addend", "summed"))
    builder.branch(loop)
    builder.position_at_end(loop)
    k, sums = builder.phi(WORD), [builder.phi(vector) for _ in range(count)]
    made = step(k, sums)
    after = builder.add(k, WORD(1))
    zero = ir.Constant(vector, [0.0] * vector.count)
    for phi, start, following in [(k, WORD(0), after)] + [(s, zero, m) for s, m in zip(sums, made, strict=True)]:
        phi.add_incoming(start, before)
        phi.add_incoming(following, loop)
    builder.cbranch(builder.icmp_signed("<", after, addends), loop, done)
    builder.position_at_end(done)
    return made


def write_sums(builder: Any, places: list[Any], sums: list[Any], adds: Any) -> None:
    """Write the sums, or add them to what is there if `adds` is not 0."""
    with builder.if_else(builder.icmp_signed("!=", adds, WORD(0))) as (more, new):
        with more:
            for place, each in zip(places, sums, strict=True):
                builder.store(builder.fadd(builder.load(place, align=4), each), place, align=4)
        with new:
            for place, each in zip(places, sums, strict=True):
                builder.store(each, place, align=4)
