"""Block hashes of hash kind 3: all blocks' tokens are hashed at once and their digests chained (docs/FORMAT.md).

Calling a hash function once per block would cost more than hashing the block's 128 tokens. So a prompt takes some dozen
calls per 2,048 blocks; each call processes one 16-byte piece of every block. Where llvmlite is installed, machine code
does the same in one call (`lane_code.py`). The block hash and the hash of the chain are standard MACs under keys of the
tenant: AES-CMAC (NIST SP 800-38B) of each block's tokens, and encrypted CBC-MAC (ISO/IEC 9797-1, algorithm 2) of the
digests so far. Anyone with a key can make two names equal; docs/FORMAT.md ("Names") says who has keys, and why no
unkeyed hash is used.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from antefix.machine_code import MadeOnce

if TYPE_CHECKING:
    from antefix.lane_code import Functions

log = logging.getLogger("antefix.names")

Bytes = npt.NDArray[np.uint8]
Words = npt.NDArray[np.uint64]

_KEY_BYTES: Final = 32
_PIECE_BYTES: Final = 16
_PIECE_WORDS: Final = 2
_NUM_LANES: Final = 2
_NO_STATE: Final = bytes(_PIECE_BYTES)
# How many blocks are hashed at a time, and of how many the pieces are gathered at a time, so that both stay in a core's
# cache. Time for all leaves of a prompt of 1M tokens on a core with 1,280 KiB: 2.0 ms with 2048 and 512, 2.1 with 1024,
# 2.5 with 512 and with all blocks at once. Gathering one piece of all blocks at a time, as before: 2.6 ms.
_ROUND_BLOCKS: Final = 2048
_GATHERED_BLOCKS: Final = 512
# A call for so many blocks makes machine code, if that was not done before. Shorter prompts gain too little from it.
_COMPILED_BLOCKS_MIN: Final = 512
# Calls for fewer blocks are so short that they keep the interpreter's lock. To get it back could take longer.
_UNLOCKED_BLOCKS_MIN: Final = 1024
# Chains that are tried before machine code is used: tokens per block and blocks. Around the number of blocks that the
# code encrypts at a time, and with blocks that are not whole pieces.
_TRIED: Final = ((1, 1), (4, 7), (6, 8), (16, 9), (128, 15), (128, 16), (128, 17), (128, 33))
# The constant R_128 of SP 800-38B, for 128-bit cipher blocks.
_CMAC_POLYNOMIAL: Final = 0x87


class LaneHashes:
    """Names the blocks of chains that start at one root. Immutable; thread-safe.

    AES-CMAC turns each block's tokens into 16 bytes. Two lanes chain these by CBC, each under its own key. A name is
    the state of both lanes, encrypted once more. So a block's name reveals nothing of the hash state, but with the
    keys, hashing can continue from any name.
    """

    def __init__(self, root: bytes, key: bytes, block_size: int) -> None:
        keys = [_key(root, key, block_size, label) for label in ("leaf", "c0", "c1", "n0", "n1")]
        # Made once, because making a cipher costs as much as encrypting a short prompt with it.
        leaf_key, *lane_keys = keys
        self._leaf_cipher = _ecb(leaf_key)
        self._lanes = tuple(
            (algorithms.AES(lane_keys[lane]), _ecb(lane_keys[_NUM_LANES + lane])) for lane in range(_NUM_LANES)
        )
        self._block_bytes = 4 * block_size
        self._last_mask = _last_mask(self._leaf_cipher, is_whole=not self._block_bytes % _PIECE_BYTES)
        self._keys = keys
        # The functions of machine code, and these keys as they need them.
        self._prepared: tuple[Functions, Bytes] | None = None

    def names(self, parent: bytes | None, raw: memoryview) -> list[bytes]:
        """The hashes of consecutive blocks, of which `raw` holds the tokens (u32, little-endian).

        parent: the hash of the block before the first of these blocks; None: they are the first blocks of the chain.
        """
        num_blocks = raw.nbytes // self._block_bytes
        code = _code().if_ready(begin=num_blocks >= _COMPILED_BLOCKS_MIN)
        names = self._plain_names(parent, raw) if code is None else self.compiled_names(code, parent, raw)
        # One pass in C cuts the array into names.
        named: list[bytes] = names.view("V32").reshape(-1).tolist()
        return named

    def compiled_names(self, code: Functions, parent: bytes | None, raw: memoryview) -> Bytes:
        """As `names`, by machine code.  Shapes:  result [num_blocks, 32]."""
        if self._prepared is None or self._prepared[0] is not code:
            self._prepared = (code, code.prepared(self._keys, self._last_mask))
        _, keys = self._prepared
        rows = self._padded(np.frombuffer(raw, np.uint8).reshape(-1, self._block_bytes))
        num_blocks, row_bytes = rows.shape
        names = np.empty((num_blocks, _NUM_LANES * _PIECE_BYTES), np.uint8)
        states = np.frombuffer(bytearray(b"".join(self._states(parent))), np.uint8)
        run = code.names if num_blocks >= _UNLOCKED_BLOCKS_MIN else code.short_names
        addresses = (each.ctypes.data for each in (keys, states, names))
        run(rows.ctypes.data, num_blocks, row_bytes // _PIECE_BYTES, *addresses)
        return names

    def _plain_names(self, parent: bytes | None, raw: memoryview) -> Bytes:
        """As `names`.  Shapes:  result [num_blocks, 32]."""
        num_blocks = raw.nbytes // self._block_bytes
        leaves = self._leaves(raw, num_blocks).data.cast("B")
        names = np.empty((num_blocks, _NUM_LANES), np.complex128)
        for lane, ((chain_key, name_cipher), state) in enumerate(zip(self._lanes, self._states(parent), strict=True)):
            states = Cipher(chain_key, modes.CBC(state)).encryptor().update(leaves)
            names[:, lane] = np.frombuffer(name_cipher.encryptor().update(states), np.complex128)
        return names.view(np.uint8)

    def _states(self, parent: bytes | None) -> list[bytes]:
        """Each lane's state after the block of this name; zeros before the first block."""
        if parent is None:
            return [_NO_STATE] * _NUM_LANES
        return [
            name_cipher.decryptor().update(parent[lane * _PIECE_BYTES :][:_PIECE_BYTES])
            for lane, (_, name_cipher) in enumerate(self._lanes)
        ]

    def _leaves(self, raw: memoryview, num_blocks: int) -> Words:
        """AES-CMAC of each block's tokens.  Shapes:  [num_blocks, 2]."""
        rows = self._padded(np.frombuffer(raw, np.uint8).reshape(num_blocks, self._block_bytes))
        # One array item per 16-byte piece, so that gathering the pieces moves 16 bytes at a time.
        pieces = rows.view(np.complex128)
        leaves = np.empty((num_blocks, _PIECE_WORDS), np.uint64)
        gathered = np.empty(min(num_blocks, _ROUND_BLOCKS) * pieces.shape[1], np.complex128)
        for first in range(0, num_blocks, _ROUND_BLOCKS):
            part = pieces[first : first + _ROUND_BLOCKS]
            columns = gathered[: part.size].reshape(part.shape[::-1])
            for start in range(0, len(part), _GATHERED_BLOCKS):
                end = start + _GATHERED_BLOCKS
                np.copyto(columns[:, start:end], part[start:end].T)
            leaves[first : first + len(part)] = self._chained(columns.view(np.uint64))
        return leaves

    def _padded(self, rows: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """Rows padded to whole pieces as CMAC requires: a 1 bit and zeros after tokens that do not fill a piece."""
        if not self._block_bytes % _PIECE_BYTES:
            return rows
        padded = np.pad(rows, ((0, 0), (0, _PIECE_BYTES - self._block_bytes % _PIECE_BYTES)))
        padded[:, self._block_bytes] = 0x80
        return padded

    def _chained(self, pieces: Words) -> Words:
        """The CMAC chaining over each block's pieces, which are overwritten.  Shapes:  pieces [pieces, 2 * blocks];
        result [blocks, 2].
        """
        num_pieces, num_words = pieces.shape
        cipher = self._leaf_cipher.encryptor()
        # The library requires an output buffer with room for one more cipher block than it fills.
        room = np.zeros(num_words + _PIECE_WORDS, np.uint64)
        states, target = room[:num_words], room.data.cast("B")
        for number, mixed in enumerate(pieces):
            np.bitwise_xor(states, mixed, out=mixed)
            if number == num_pieces - 1:
                mixed.reshape(-1, _PIECE_WORDS)[:] ^= np.frombuffer(self._last_mask, np.uint64)
            cipher.update_into(mixed.data.cast("B"), target)
        return states.reshape(-1, _PIECE_WORDS)


@functools.cache
def _code() -> MadeOnce[Functions]:
    return MadeOnce(_tried_code, log, "prompts are named without compiled code, which is slower")


def compiled_code() -> Functions | None:
    """Machine code that names blocks. None if llvmlite is not installed, or if the code is wrong on this machine."""
    return _code().now()


def used_instead(code: Functions | None) -> contextlib.AbstractContextManager[None]:
    """In this context, all blocks of this process are named by `code`. For tests and benchmarks."""
    return _code().used_instead(code)


def _tried_code() -> Functions:
    from antefix.lane_code import compiled

    code = compiled()
    if wrong := [tried for tried in _TRIED if not is_right(code, *tried)]:
        raise RuntimeError(f"it named chains of these blocks wrongly: {wrong}")
    return code


def is_right(code: Functions, block_size: int, num_blocks: int) -> bool:
    """Whether machine code names this many blocks as the library does, at the start of a chain and further on."""
    lanes = LaneHashes(b"root", b"key", block_size)
    tokens = np.arange(num_blocks * block_size, dtype=np.uint32) * np.uint32(0x9E3779B1)
    return all(
        np.array_equal(
            lanes.compiled_names(code, parent, tokens.data.cast("B")), lanes._plain_names(parent, tokens.data.cast("B"))
        )
        for parent in (None, bytes(range(32)))
    )


@functools.lru_cache(1024)
def lane_hashes(root: bytes, key: bytes, block_size: int) -> LaneHashes:
    """The `LaneHashes` of a root, cached: deriving its keys costs more than naming a short prompt."""
    return LaneHashes(root, key, block_size)


def _last_mask(cipher: Cipher[modes.ECB], *, is_whole: bool) -> bytes:
    """CMAC's subkey K1 (the message ends with a whole piece) or K2 (it does not)."""
    mask = int.from_bytes(cipher.encryptor().update(bytes(_PIECE_BYTES)), "big")
    for _ in range(1 if is_whole else 2):
        mask <<= 1
        if mask >> 128:
            mask = (mask ^ _CMAC_POLYNOMIAL) & (2**128 - 1)
    return mask.to_bytes(_PIECE_BYTES, "big")


def _key(root: bytes, key: bytes, block_size: int, label: str) -> bytes:
    of = root + block_size.to_bytes(4, "little") + label.encode()
    return hashlib.blake2b(of, digest_size=_KEY_BYTES, key=key, person=b"antefix-lanes").digest()


def _ecb(key: bytes) -> Cipher[modes.ECB]:
    return Cipher(algorithms.AES(key), modes.ECB())
