"""The code behind `lane_hashes`, written with llvmlite: AES-CMAC of many blocks at once, chained as they are made.

The processor's AES instructions need several independent inputs at a time to be fast. A group of blocks gives as many:
one vector has a piece of one, two or four blocks, and four or eight vectors are encrypted in turn. The chain has one
input per lane, so while it waits for itself, the processor encrypts the names before it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from llvmlite import ir

from antefix.machine_code import engine_of, host_features, new_module

_WORD, _INT, _BYTE = ir.IntType(64), ir.IntType(32), ir.IntType(8)
_PIECE = ir.VectorType(_WORD, 2)
_PIECE_BYTES: Final = 16
_LINE_BYTES: Final = 64
# Of AES-256.
_ROUND_KEYS: Final = 15
_SCHEDULE_BYTES: Final = _ROUND_KEYS * _PIECE_BYTES
# The keys leaf, c0, c1, n0 and n1 are expanded one after the other, and the mask of a leaf's last piece follows.
_NUM_KEYS: Final = 5
_MASK_AT: Final = _NUM_KEYS * _SCHEDULE_BYTES


@dataclass(frozen=True, slots=True)
class Shape:
    """How many blocks are encrypted at a time: in `num_vectors` vectors of `width` blocks each."""

    width: int
    num_vectors: int

    @property
    def num_blocks(self) -> int:
        return self.width * self.num_vectors


def shapes_of(features: dict[str, bool]) -> list[Shape]:
    """The shapes that a processor with these features can use, the fastest first. Raises: RuntimeError: there is none.

    Without VAES, a vector has one block. With fewer registers (AVX-512 has 32), more vectors would not fit.
    """
    if not features.get("aes"):
        raise RuntimeError("this processor has no AES instructions of x86")
    has_vaes = bool(features.get("vaes"))
    wide = [Shape(4, 4)] if has_vaes and features.get("avx512f") else []
    return [*wide, *([Shape(2, 8)] if has_vaes and features.get("avx2") else []), Shape(1, 8)]


@dataclass(frozen=True, slots=True)
class Functions:
    """expand(key, schedule): the round keys of an AES-256 key.

    names(tokens, number of blocks, pieces per block, keys, states, names): writes 32 bytes per block to `names`. Both
    lanes' states go in and come out in `states`, 32 bytes. `short_names` is the same and keeps the interpreter's lock.
    """

    expand: Callable[[Any, Any], None]
    names: Callable[..., None]
    short_names: Callable[..., None]
    owner: Any

    def prepared(self, keys: Sequence[bytes], last_mask: bytes) -> npt.NDArray[np.uint8]:
        """What `names` needs of the keys leaf, c0, c1, n0 and n1, and of the mask of a leaf's last piece."""
        made = np.empty(_MASK_AT + _PIECE_BYTES, np.uint8)
        for number, key in enumerate(keys):
            self.expand(key, made[number * _SCHEDULE_BYTES :].ctypes.data)
        made[_MASK_AT:] = np.frombuffer(last_mask, np.uint8)
        return made


def compiled(shape: Shape | None = None) -> Functions:
    """shape: the fastest that this processor can use if None.

    Raises:  RuntimeError, ...: this machine has no AES instructions that are used here.  ImportError: no llvmlite.
    """
    module = new_module("lane_hashes")
    _define_expand(module)
    _define_names(module, shape or shapes_of(host_features())[0])
    engine = engine_of(module)
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    address = engine.get_function_address("names")
    arguments = (None, pointer, number, number, pointer, pointer, pointer)
    return Functions(
        ctypes.PYFUNCTYPE(None, pointer, pointer)(engine.get_function_address("expand")),
        ctypes.CFUNCTYPE(*arguments)(address),
        ctypes.PYFUNCTYPE(*arguments)(address),
        engine,
    )


def _define_expand(module: ir.Module) -> None:
    """FIPS 197, section 5.2, as the processor's instruction helps with it."""
    pointer = _BYTE.as_pointer()
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [pointer, pointer]), "expand")
    key, schedule = function.args
    b = ir.IRBuilder(function.append_basic_block("begin"))
    assist = _intrinsic(module, "llvm.x86.aesni.aeskeygenassist", _PIECE, [_PIECE, _BYTE])
    halves = [_load(b, key, 0), _load(b, key, _PIECE_BYTES)]
    made = list(halves)
    while len(made) < _ROUND_KEYS:
        # Even round keys rotate a word and add a round constant, odd ones do not.
        is_even = len(made) % 2 == 0
        constant, word = (1 << (len(made) // 2 - 1), 3) if is_even else (0, 2)
        helped = b.bitcast(b.call(assist, [made[-1], ir.Constant(_BYTE, constant)]), ir.VectorType(_INT, 4))
        chosen = ir.Constant(ir.VectorType(_INT, 4), [word] * 4)
        helped = b.bitcast(b.shuffle_vector(helped, helped, chosen), _PIECE)
        made.append(b.xor(_sums_of_words(b, made[-2]), helped))
    for number, round_key in enumerate(made):
        _store(b, round_key, schedule, number * _PIECE_BYTES)
    b.ret_void()


def _sums_of_words(b: ir.IRBuilder, piece: Any) -> Any:
    """Each word of 32 bits XOR all words before it."""
    wide = b.bitcast(piece, ir.IntType(128))
    for bits in (32, 64):
        wide = b.xor(wide, b.shl(wide, ir.IntType(128)(bits)))
    return b.bitcast(wide, _PIECE)


def _define_names(module: ir.Module, shape: Shape) -> None:
    pointer = _BYTE.as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [pointer, _WORD, _WORD, pointer, pointer, pointer])
    function = ir.Function(module, kind, "names")
    tokens, num_blocks, num_pieces, keys, states, names = function.args
    b = ir.IRBuilder(function.append_basic_block("begin"))
    leaves = b.alloca(_PIECE, shape.num_blocks)
    start = [_load(b, states, lane * _PIECE_BYTES) for lane in range(2)]
    before, test, group, done = b.block, *(b.append_basic_block(name) for name in ("groups", "group", "done"))
    b.branch(test)
    b.position_at_end(test)
    first, *at_first = b.phi(_WORD), b.phi(_PIECE), b.phi(_PIECE)
    b.cbranch(b.icmp_signed("<", first, num_blocks), group, done)
    b.position_at_end(group)
    _leaves(b, module, shape, tokens, first, num_blocks, num_pieces, keys, leaves)
    following = b.add(first, _WORD(shape.num_blocks))
    end = b.select(b.icmp_signed("<", following, num_blocks), following, num_blocks)
    after = _chained(b, module, leaves, first, end, keys, at_first, names)
    for phi, value, next_value in zip((first, *at_first), (_WORD(0), *start), (following, *after), strict=True):
        phi.add_incoming(value, before)
        phi.add_incoming(next_value, b.block)
    b.branch(test)
    b.position_at_end(done)
    for lane, state in enumerate(at_first):
        _store(b, state, states, lane * _PIECE_BYTES)
    b.ret_void()


def _leaves(
    b: ir.IRBuilder,
    module: ir.Module,
    shape: Shape,
    tokens: Any,
    first: Any,
    num_blocks: Any,
    num_pieces: Any,
    keys: Any,
    leaves: Any,
) -> None:
    """AES-CMAC of the group's blocks. A group that ends after the last block takes that block several times."""
    vector = ir.VectorType(_WORD, 2 * shape.width)
    encrypt = _Encryption(b, module, shape.width, keys, label=0)
    mask = _repeated(b, _load(b, keys, _MASK_AT), shape.width)
    block_bytes = b.mul(num_pieces, _WORD(_PIECE_BYTES))
    last = b.sub(num_blocks, _WORD(1))
    rows = []
    for number in range(shape.num_blocks):
        at = b.add(first, _WORD(number))
        at = b.select(b.icmp_signed("<", at, last), at, last)
        rows.append(b.gep(tokens, [b.mul(at, block_bytes)]))
    ahead = b.gep(tokens, [b.mul(b.add(first, _WORD(shape.num_blocks)), block_bytes)])
    before, loop, done = b.block, b.append_basic_block("piece"), b.append_basic_block("pieces done")
    b.branch(loop)
    b.position_at_end(loop)
    number, mixed = b.phi(_WORD), [b.phi(vector) for _ in range(shape.num_vectors)]
    at = b.mul(number, _WORD(_PIECE_BYTES))
    # The tokens of the next group; this reads nothing, so it may lie behind the last block.
    for line in range(0, shape.num_blocks * _PIECE_BYTES, _LINE_BYTES):
        _prefetch(b, module, b.gep(ahead, [b.add(b.mul(number, _WORD(shape.num_blocks * _PIECE_BYTES)), _WORD(line))]))
    is_last = b.icmp_signed("==", b.add(number, _WORD(1)), num_pieces)
    with_mask = b.select(is_last, mask, ir.Constant(vector, [0] * 2 * shape.width))
    made = []
    for each, state in enumerate(mixed):
        of = [_load(b, b.gep(row, [at]), 0) for row in rows[each * shape.width :][: shape.width]]
        made.append(b.xor(b.xor(state, _joined(b, of)), with_mask))
    made = encrypt(b, made)
    following = b.add(number, _WORD(1))
    zeros = [ir.Constant(vector, [0] * 2 * shape.width)] * shape.num_vectors
    for phi, value, next_value in zip((number, *mixed), (_WORD(0), *zeros), (following, *made), strict=True):
        phi.add_incoming(value, before)
        phi.add_incoming(next_value, b.block)
    b.cbranch(is_last, done, loop)
    b.position_at_end(done)
    for each, leaf in enumerate(made):
        place = b.bitcast(b.gep(leaves, [_WORD(each * shape.width)]), vector.as_pointer())
        b.store(leaf, place, align=_PIECE_BYTES)


def _chained(
    b: ir.IRBuilder, module: ir.Module, leaves: Any, first: Any, end: Any, keys: Any, states: Sequence[Any], names: Any
) -> list[Any]:
    """The names of blocks `first` to `end`. Returns the states after them."""
    chain = [_Encryption(b, module, 1, keys, label=label) for label in (1, 2)]
    name = [_Encryption(b, module, 1, keys, label=label) for label in (3, 4)]
    before, loop, done = b.block, b.append_basic_block("link"), b.append_basic_block("links done")
    b.branch(loop)
    b.position_at_end(loop)
    number, *at_first = b.phi(_WORD), b.phi(_PIECE), b.phi(_PIECE)
    leaf = b.load(b.gep(leaves, [b.sub(number, first)]), align=_PIECE_BYTES)
    after = []
    for lane, state in enumerate(at_first):
        (made,) = chain[lane](b, [b.xor(state, leaf)])
        (named,) = name[lane](b, [made])
        _store(b, named, b.gep(names, [b.mul(number, _WORD(2 * _PIECE_BYTES))]), lane * _PIECE_BYTES)
        after.append(made)
    following = b.add(number, _WORD(1))
    for phi, value, next_value in zip((number, *at_first), (first, *states), (following, *after), strict=True):
        phi.add_incoming(value, before)
        phi.add_incoming(next_value, b.block)
    b.cbranch(b.icmp_signed("<", following, end), loop, done)
    b.position_at_end(done)
    return after


class _Encryption:
    """AES-256 of vectors of `width` pieces under one key. The round keys are loaded where the object is made."""

    def __init__(self, b: ir.IRBuilder, module: ir.Module, width: int, keys: Any, *, label: int) -> None:
        at = label * _SCHEDULE_BYTES
        self._round_keys = [
            _repeated(b, _load(b, keys, at + number * _PIECE_BYTES), width) for number in range(_ROUND_KEYS)
        ]
        vector = ir.VectorType(_WORD, 2 * width)
        suffix = "" if width == 1 else f".{128 * width}"
        self._round, self._last = (
            _intrinsic(module, f"llvm.x86.aesni.{name}{suffix}", vector, [vector, vector])
            for name in ("aesenc", "aesenclast")
        )

    def __call__(self, b: ir.IRBuilder, vectors: Sequence[Any]) -> list[Any]:
        first, *middle, last = self._round_keys
        made = [b.xor(vector, first) for vector in vectors]
        for round_key in middle:
            made = [b.call(self._round, [vector, round_key]) for vector in made]
        return [b.call(self._last, [vector, last]) for vector in made]


def _intrinsic(module: ir.Module, name: str, result: Any, arguments: Sequence[Any]) -> Any:
    # llvmlite's own declaration of intrinsics knows no vectors.
    found = module.globals.get(name)
    return found if found is not None else ir.Function(module, ir.FunctionType(result, arguments), name)


def _prefetch(b: ir.IRBuilder, module: ir.Module, address: Any) -> None:
    """Ask for a line to be read. An address outside of the process' memory does no harm."""
    intrinsic = _intrinsic(module, "llvm.prefetch.p0", ir.VoidType(), [_BYTE.as_pointer(), _INT, _INT, _INT])
    is_write, locality, is_data = _INT(0), _INT(3), _INT(1)
    b.call(intrinsic, [address, is_write, locality, is_data])


def _joined(b: ir.IRBuilder, pieces: Sequence[Any]) -> Any:
    """One vector of one, two or four pieces."""
    vectors = list(pieces)
    while len(vectors) > 1:
        words = 2 * len(pieces) // len(vectors) * 2
        whole = ir.Constant(ir.VectorType(_INT, words), list(range(words)))
        vectors = [b.shuffle_vector(vectors[at], vectors[at + 1], whole) for at in range(0, len(vectors), 2)]
    return vectors[0]


def _repeated(b: ir.IRBuilder, piece: Any, width: int) -> Any:
    return _joined(b, [piece] * width)


def _load(b: ir.IRBuilder, base: Any, offset: int) -> Any:
    return b.load(b.bitcast(b.gep(base, [_WORD(offset)]), _PIECE.as_pointer()), align=1)


def _store(b: ir.IRBuilder, piece: Any, base: Any, offset: int) -> None:
    b.store(piece, b.bitcast(b.gep(base, [_WORD(offset)]), _PIECE.as_pointer()), align=1)
