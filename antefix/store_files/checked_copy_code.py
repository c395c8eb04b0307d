"""The code behind `checked_copy`, written with llvmlite: preadv2, copy and the long form of XXH3-128 in one loop.

XXH3 keeps eight sums of 64 bits. It adds a stripe of 64 bytes to them at a time, scrambles them after 16 stripes, and
at the end folds them into 128 bits (xxHash's doc/xxhash_spec.md, "XXH3 algorithm: for large inputs"). The vectors here
are as wide as the sums; LLVM divides them into at most 256 bits. A header's own checksum is the medium form of XXH3-64.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any, Final

from llvmlite import ir

from antefix.machine_code import engine_of, new_module
from antefix.store_files.checked_copy import ALIGN, DIGEST_BYTES, ROW_WORDS
from antefix.store_files.record_format import CHECK_OFFSET, RECORD_HEADER_BYTES

_WORD, _INT, _BYTE = ir.IntType(64), ir.IntType(32), ir.IntType(8)
_POINTER = _BYTE.as_pointer()
_LANES = ir.VectorType(_WORD, 8)
# ssize_t preadv2(int fd, const struct iovec *, int count, off_t offset, int flags)
_PREADV2 = ir.FunctionType(_WORD, [_INT, _POINTER, _INT, _WORD, _INT])
_STRIPE, _STRIPES_PER_BLOCK, _BLOCK = 64, 16, 1024
# Bytes of the widest store that is used.
_WIDE: Final = 32
_PAGE: Final = 4096

_PRIME32_1, _PRIME32_2, _PRIME32_3 = 0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D
_PRIME64_1, _PRIME64_2, _PRIME64_3 = 0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9
_PRIME64_4, _PRIME64_5, _PRIME_MX1 = 0x85EBCA77C2B2AE63, 0x27D4EB2F165667C5, 0x165667919E3779F9
_START: Final = (_PRIME32_3, _PRIME64_1, _PRIME64_2, _PRIME64_3, _PRIME64_4, _PRIME32_2, _PRIME64_5, _PRIME32_1)
# XXH3's default secret, and where its last parts are used.
_SECRET: Final = bytes.fromhex(
    "b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671fcb79e64eccc0e578825ad07dccff7221"
    "b8084674f743248ee03590e6813a264c3c2852bb91c300cb88d0658b1b532ea371644897a20df94e3819ef46a9deacd8"
    "a8fa763fe39c343ff9dcbbc7c70b4f1d8a51e04bcdb45931c89f7ec9d9787364eac5ac8334d3ebc3c581a0fffa1363eb"
    "170ddd51b7f0da49d316552629d4689e2b16be587d47a1fc8ff8b8d17ad031ce45cb3a8f95160428afd7fbcabb4b407e"
)
_SCRAMBLE_AT, _LAST_AT, _LOW_AT, _HIGH_AT = 128, 121, 11, 117
# The medium form, for 129 to 240 bytes, has pieces of 16. The keys of the ninth and of the last one begin here.
_PIECE, _FIRST_PIECES, _NINTH_AT, _END_AT = 16, 8, 3, 119
_HEADER_CHECKED: Final = RECORD_HEADER_BYTES - CHECK_OFFSET
assert _HEADER_CHECKED == 240
# Vectors of 512 bits made the loop 1 to 2% slower, on a processor that has them.
_VECTOR_BITS_MAX: Final = 256


def compiled(piece_bytes: int) -> tuple[Callable[..., int], Any]:
    """The function read(fd, rows, number of rows, buffer, flags of preadv2, seed), and what keeps it in memory.

    Raises:  RuntimeError, AttributeError, ...: this version of llvmlite is too old, or knows no code for this machine.
    """
    module = new_module("checked_copy")
    secret = ir.GlobalVariable(module, ir.ArrayType(_BYTE, len(_SECRET)), "secret")
    secret.initializer, secret.global_constant = ir.Constant(secret.value_type, bytearray(_SECRET)), True
    _define_read(module, secret, piece_bytes)
    engine = engine_of(module, vector_bits_max=_VECTOR_BITS_MAX)
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    kind = ctypes.CFUNCTYPE(number, ctypes.c_int32, pointer, number, pointer, ctypes.c_int32, ctypes.c_uint64)
    return kind(engine.get_function_address("read")), engine


def _define_read(module: ir.Module, secret: Any, piece_bytes: int) -> None:
    """read(fd, rows, num_rows, buffer, flags, seed): the number of leading rows that were read completely."""
    function = ir.Function(module, ir.FunctionType(_WORD, [_INT, _POINTER, _WORD, _POINTER, _INT, _WORD]), "read")
    fd, rows, num_rows, buffer, flags, seed = function.args
    b = ir.IRBuilder(function.append_basic_block("begin"))
    address = ctypes.cast(ctypes.CDLL(None).preadv2, ctypes.c_void_p).value
    preadv2 = b.inttoptr(_WORD(address), _PREADV2.as_pointer())
    iovec = b.alloca(_WORD, 2)
    row, piece, failed, done = (function.append_basic_block(name) for name in ("row", "piece", "failed", "done"))
    before = b.block
    b.branch(row)

    # 1. The next row, if there is one.
    b.position_at_end(row)
    number = b.phi(_WORD)
    number.add_incoming(_WORD(0), before)
    begin = function.append_basic_block("first piece")
    b.cbranch(b.icmp_signed("<", number, num_rows), begin, done)
    b.position_at_end(begin)
    fields = b.bitcast(_at(b, rows, b.mul(number, _WORD(8 * ROW_WORDS))), _WORD.as_pointer())
    offset, into, nbytes, header, digest = (b.load(b.gep(fields, [_WORD(each)])) for each in range(ROW_WORDS))
    record = _place_in(b, buffer, offset, into)
    payload = _at(b, record, _WORD(RECORD_HEADER_BYTES))
    b.branch(piece)

    # 2. One piece of it after the other. The last one has at least a stripe.
    b.position_at_end(piece)
    at, sums = b.phi(_WORD), b.phi(_LANES)
    at.add_incoming(_WORD(0), begin)
    sums.add_incoming(_lanes(_START), begin)
    left = b.sub(nbytes, at)
    is_last = b.icmp_signed("<=", left, _WORD(piece_bytes + _BLOCK))
    take = b.select(is_last, left, _WORD(piece_bytes))
    # The first piece is read together with the header before it.
    head_bytes = b.select(b.icmp_signed("==", at, _WORD(0)), _WORD(RECORD_HEADER_BYTES), _WORD(0))
    length = b.add(head_bytes, take)
    source = b.sub(b.add(b.add(offset, _WORD(RECORD_HEADER_BYTES)), at), head_bytes)
    b.store(b.ptrtoint(_at(b, payload, b.neg(head_bytes)), _WORD), iovec)
    b.store(length, b.gep(iovec, [_WORD(1)]))
    got = b.call(preadv2, [fd, b.bitcast(iovec, _POINTER), _INT(1), source, flags])
    hashing = function.append_basic_block("hash")
    b.cbranch(b.icmp_signed("==", got, length), hashing, failed)
    b.position_at_end(hashing)
    place = b.add(into, at)
    num_blocks = b.udiv(b.select(is_last, b.sub(take, _WORD(1)), take), _WORD(_BLOCK))
    hashed = _whole_blocks(b, payload, place, num_blocks, sums)
    following = b.add(at, take)
    at.add_incoming(following, b.block)
    sums.add_incoming(hashed, b.block)
    finish = function.append_basic_block("finish")
    b.cbranch(is_last, finish, piece)

    # 3. The rest of the last piece, the header and both checksums.
    b.position_at_end(finish)
    used = b.mul(num_blocks, _WORD(_BLOCK))
    _finish(b, secret, _at(b, payload, used), b.add(place, used), b.sub(take, used), nbytes, hashed, digest)
    for stripe in range(0, RECORD_HEADER_BYTES, _STRIPE):
        data = b.load(b.bitcast(_at(b, record, _WORD(stripe)), _LANES.as_pointer()), align=1)
        b.store(data, b.inttoptr(b.add(header, _WORD(stripe)), _LANES.as_pointer()), align=1)
    header_sum = _medium_hash(b, _at(b, record, _WORD(CHECK_OFFSET)), seed)
    b.store(header_sum, b.inttoptr(b.add(digest, _WORD(DIGEST_BYTES)), _WORD.as_pointer()), align=1)
    following = b.add(number, _WORD(1))
    number.add_incoming(following, b.block)
    b.branch(row)

    b.position_at_end(failed)
    b.branch(done)
    b.position_at_end(done)
    _order_stores(b, module)
    b.ret(number)


def _place_in(b: ir.IRBuilder, buffer: Any, offset: Any, into: Any) -> Any:
    """Where in the buffer a record should lie, which is read from this offset, and whose payload goes to `into`."""
    # The kernel copies faster if source and buffer lie at the same place of a cache line.
    record = _at(b, buffer, b.and_(offset, _WORD(_STRIPE - 1)))
    # If a block's place lies shortly after its bytes in the buffer, modulo a page, loads wait for stores before them.
    ahead = b.sub(into, b.ptrtoint(_at(b, record, _WORD(RECORD_HEADER_BYTES)), _WORD))
    is_short = b.icmp_unsigned("<", b.and_(ahead, _WORD(_PAGE - 1)), _WORD(_PAGE // 4))
    return _at(b, record, b.select(is_short, _WORD(_PAGE // 2), _WORD(0)))


def _whole_blocks(b: ir.IRBuilder, source: Any, place: Any, num_blocks: Any, sums: Any) -> Any:
    """The sums after `num_blocks` blocks of 1,024 bytes, which are copied with stores that bypass the caches.

    The stores are as wide as the place's alignment allows: 32 bytes at a time are faster than 16.
    """
    after = []
    with b.if_else(b.icmp_unsigned("==", b.and_(place, _WORD(_WIDE - 1)), _WORD(0))) as branches:
        for branch, store_bytes in zip(branches, (_WIDE, ALIGN), strict=True):
            with branch:
                made = _loop_over_blocks(b, source, place, num_blocks, sums, store_bytes)
                after.append((made, b.block))
    result = b.phi(_LANES)
    for made, block in after:
        result.add_incoming(made, block)
    return result


def _loop_over_blocks(b: ir.IRBuilder, source: Any, place: Any, num_blocks: Any, sums: Any, store_bytes: int) -> Any:
    """As `_whole_blocks`, with stores of this width."""
    before, test, block, done = b.block, *(b.append_basic_block(name) for name in ("blocks", "block", "blocks done"))
    b.branch(test)
    b.position_at_end(test)
    number, at_first = b.phi(_WORD), b.phi(_LANES)
    b.cbranch(b.icmp_unsigned("<", number, num_blocks), block, done)
    b.position_at_end(block)
    start = b.mul(number, _WORD(_BLOCK))
    made = at_first
    for stripe in range(_STRIPES_PER_BLOCK):
        at = b.add(start, _WORD(stripe * _STRIPE))
        data = b.load(b.bitcast(_at(b, source, at), _LANES.as_pointer()), align=1)
        _store_past_caches(b, data, b.add(place, at), store_bytes)
        made = _add_stripe(b, made, data, _key(8 * stripe))
    made = _scramble(b, made)
    for phi, start_value, value in ((number, _WORD(0), b.add(number, _WORD(1))), (at_first, sums, made)):
        phi.add_incoming(start_value, before)
        phi.add_incoming(value, b.block)
    b.branch(test)
    b.position_at_end(done)
    return at_first


def _finish(
    b: ir.IRBuilder, secret: Any, source: Any, place: Any, left: Any, nbytes: Any, sums: Any, digest: Any
) -> None:
    """Hash and copy the last 1 to 1,024 bytes, and write the checksum. At least a stripe lies before their end."""
    num_stripes = b.udiv(b.sub(left, _WORD(1)), _WORD(_STRIPE))
    before, test, stripe, done = b.block, *(b.append_basic_block(name) for name in ("rest", "stripe", "rest done"))
    b.branch(test)
    b.position_at_end(test)
    number, so_far = b.phi(_WORD), b.phi(_LANES)
    b.cbranch(b.icmp_unsigned("<", number, num_stripes), stripe, done)
    b.position_at_end(stripe)
    at = b.mul(number, _WORD(_STRIPE))
    data = b.load(b.bitcast(_at(b, source, at), _LANES.as_pointer()), align=1)
    b.store(data, b.inttoptr(b.add(place, at), _LANES.as_pointer()), align=1)
    key = b.load(b.bitcast(b.gep(secret, [_WORD(0), b.mul(number, _WORD(8))]), _LANES.as_pointer()), align=1)
    made = _add_stripe(b, so_far, data, key)
    for phi, start, value in ((number, _WORD(0), b.add(number, _WORD(1))), (so_far, sums, made)):
        phi.add_incoming(start, before)
        phi.add_incoming(value, b.block)
    b.branch(test)
    b.position_at_end(done)
    # The last stripe ends with the block, so it overlaps the stripe before it.
    last = b.sub(left, _WORD(_STRIPE))
    data = b.load(b.bitcast(_at(b, source, last), _LANES.as_pointer()), align=1)
    b.store(data, b.inttoptr(b.add(place, last), _LANES.as_pointer()), align=1)
    total = _add_stripe(b, so_far, data, _key(_LAST_AT))
    low = _merge(b, total, _LOW_AT, b.mul(nbytes, _WORD(_PRIME64_1)))
    high = _merge(b, total, _HIGH_AT, b.not_(b.mul(nbytes, _WORD(_PRIME64_2))))
    # The digest has its bytes in the order of a big number.
    words = b.inttoptr(digest, _WORD.as_pointer())
    for number, half in enumerate((high, low)):
        b.store(b.bswap(half), b.gep(words, [_WORD(number)]), align=1)


def _add_stripe(b: ir.IRBuilder, sums: Any, data: Any, key: Any) -> Any:
    mixed = b.xor(data, key)
    low = b.and_(mixed, _all_lanes(0xFFFFFFFF))
    high = b.lshr(mixed, _all_lanes(32))
    swapped = b.shuffle_vector(data, data, ir.Constant(ir.VectorType(_INT, 8), [1, 0, 3, 2, 5, 4, 7, 6]))
    return b.add(b.add(sums, swapped), b.mul(low, high))


def _scramble(b: ir.IRBuilder, sums: Any) -> Any:
    mixed = b.xor(b.xor(sums, b.lshr(sums, _all_lanes(47))), _key(_SCRAMBLE_AT))
    return b.mul(mixed, _all_lanes(_PRIME32_1))


def _merge(b: ir.IRBuilder, sums: Any, secret_at: int, start: Any) -> Any:
    """Fold eight sums into 64 bits."""
    mixed, result = b.xor(sums, _key(secret_at)), start
    for pair in range(4):
        one, other = (b.extract_element(mixed, _INT(2 * pair + each)) for each in (0, 1))
        result = b.add(result, _folded_product(b, one, other))
    return _avalanche(b, result)


def _medium_hash(b: ir.IRBuilder, source: Any, seed: Any) -> Any:
    """XXH3-64 of a header after its own checksum."""
    num_pieces = _HEADER_CHECKED // _PIECE
    keys_at = [_PIECE * number for number in range(_FIRST_PIECES)]
    keys_at += [_PIECE * number + _NINTH_AT for number in range(num_pieces - _FIRST_PIECES)] + [_END_AT]
    result = _WORD(_HEADER_CHECKED * _PRIME64_1 % (1 << 64))
    for number, key_at in enumerate(keys_at):
        if number == _FIRST_PIECES:
            result = _avalanche(b, result)
        # The last 16 bytes are added twice, the second time with the last key.
        begin = _PIECE * min(number, num_pieces - 1)
        at = b.bitcast(_at(b, source, _WORD(begin)), _WORD.as_pointer())
        low, high = (b.load(b.gep(at, [_WORD(each)]), align=1) for each in (0, 1))
        keys = [int.from_bytes(_SECRET[begin : begin + 8], "little") for begin in (key_at, key_at + 8)]
        one, other = b.xor(low, b.add(_WORD(keys[0]), seed)), b.xor(high, b.sub(_WORD(keys[1]), seed))
        result = b.add(result, _folded_product(b, one, other))
    return _avalanche(b, result)


def _folded_product(b: ir.IRBuilder, one: Any, other: Any) -> Any:
    wide = ir.IntType(128)
    product = b.mul(b.zext(one, wide), b.zext(other, wide))
    return b.xor(b.trunc(product, _WORD), b.trunc(b.lshr(product, wide(64)), _WORD))


def _avalanche(b: ir.IRBuilder, word: Any) -> Any:
    mixed = b.mul(b.xor(word, b.lshr(word, _WORD(37))), _WORD(_PRIME_MX1))
    return b.xor(mixed, b.lshr(mixed, _WORD(32)))


def _store_past_caches(b: ir.IRBuilder, data: Any, address: Any, store_bytes: int) -> None:
    """In parts of `store_bytes`, because LLVM keeps the hint only for stores whose alignment is their size. numpy
    aligns arrays to 16 bytes, torch to 64.
    """
    num_lanes = store_bytes // 8
    kind = ir.VectorType(_WORD, num_lanes)
    for first in range(0, 8, num_lanes):
        lanes = ir.Constant(ir.VectorType(_INT, num_lanes), list(range(first, first + num_lanes)))
        place = b.inttoptr(b.add(address, _WORD(8 * first)), kind.as_pointer())
        stored = b.store(b.shuffle_vector(data, data, lanes), place, align=store_bytes)
        stored.set_metadata("nontemporal", b.module.add_metadata([_INT(1)]))


def _order_stores(b: ir.IRBuilder, module: ir.Module) -> None:
    """Stores past the caches become visible to other threads before the function returns."""
    b.fence("seq_cst")
    if module.triple.startswith(("x86_64", "i686")):
        b.call(module.declare_intrinsic("llvm.x86.sse.sfence", (), ir.FunctionType(ir.VoidType(), [])), [])


def _key(at: int) -> ir.Constant:
    """64 bytes of the secret."""
    return _lanes([int.from_bytes(_SECRET[at + 8 * each : at + 8 * each + 8], "little") for each in range(8)])


def _all_lanes(value: int) -> ir.Constant:
    return _lanes([value] * 8)


def _lanes(values: Sequence[int]) -> ir.Constant:
    return ir.Constant(_LANES, list(values))


def _at(b: ir.IRBuilder, base: Any, offset: Any) -> Any:
    return b.gep(base, [offset])
