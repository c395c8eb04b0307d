"""Block hashes of hash kind 3: all blocks' tokens are hashed at once and their digests chained (docs/FORMAT.md).

Calling a hash function once per block would cost more than hashing the block's 128 tokens. So a prompt takes a few
dozen calls in all; each call
processes one 16-byte piece of every block. The block hash and the hash of the chain are standard MACs under keys of
the tenant: AES-CMAC (NIST SP 800-38B) of each block's tokens, and encrypted CBC-MAC (ISO/IEC 9797-1, algorithm 2) of
the digests so far. Anyone with a key can make two names equal; docs/FORMAT.md ("Names") says who has keys, and why no
unkeyed hash is used.
"""

from __future__ import annotations

import functools
import hashlib
from typing import Final

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

Words = npt.NDArray[np.uint64]

_KEY_BYTES: Final = 32
_PIECE_BYTES: Final = 16
_PIECE_WORDS: Final = 2
_NUM_LANES: Final = 2
_NO_STATE: Final = bytes(_PIECE_BYTES)
# How many blocks are hashed at a time, so that their states stay in a core's cache. Measured for blocks of 512 bytes,
# time for all leaves of a prompt of 1M tokens: 2.3 ms with 512 blocks at a time, 1.8 with 1024, 1.5 with 2048, 1.3 with
# 4096, 1.25 with all 7813. Transposing all pieces first: 1.55 ms.
_ROUND_BLOCKS: Final = 8192
# The constant R_128 of SP 800-38B, for 128-bit cipher blocks.
_CMAC_POLYNOMIAL: Final = 0x87


class LaneHashes:
    """Names the blocks of chains that start at one root. Immutable; thread-safe.

    AES-CMAC turns each block's tokens into 16 bytes. Two lanes chain these by CBC, each under its own key. A name is
    the state of both lanes, encrypted once more. So a block's name reveals nothing of the hash state, but with the
    keys, hashing can continue from any name.
    """

    def __init__(self, root: bytes, key: bytes, block_size: int) -> None:
        keys = {label: _key(root, key, block_size, label) for label in ("leaf", "c0", "c1", "n0", "n1")}
        # Made once, because making a cipher costs as much as encrypting a short prompt with it.
        self._leaf_cipher = _ecb(keys["leaf"])
        self._lanes = tuple((algorithms.AES(keys[f"c{lane}"]), _ecb(keys[f"n{lane}"])) for lane in range(_NUM_LANES))
        self._block_bytes = 4 * block_size
        self._last_mask = np.frombuffer(
            _last_mask(self._leaf_cipher, is_whole=not self._block_bytes % _PIECE_BYTES), np.uint64
        )

    def names(self, parent: bytes | None, raw: memoryview) -> list[bytes]:
        """The hashes of consecutive blocks, of which `raw` holds the tokens (u32, little-endian).

        parent: the hash of the block before the first of these blocks; None: they are the first blocks of the chain.
        """
        num_blocks = raw.nbytes // self._block_bytes
        leaves = self._leaves(raw, num_blocks).data.cast("B")
        names = np.empty((num_blocks, len(self._lanes)), np.complex128)
        for lane, (chain_key, name_cipher) in enumerate(self._lanes):
            state = _NO_STATE
            if parent is not None:
                state = name_cipher.decryptor().update(parent[lane * _PIECE_BYTES :][:_PIECE_BYTES])
            states = Cipher(chain_key, modes.CBC(state)).encryptor().update(leaves)
            names[:, lane] = np.frombuffer(name_cipher.encryptor().update(states), np.complex128)
        # One pass in C cuts the array into names.
        named: list[bytes] = names.view("V32").reshape(-1).tolist()
        return named

    def _leaves(self, raw: memoryview, num_blocks: int) -> Words:
        """AES-CMAC of each block's tokens.  Shapes:  [num_blocks, 2]."""
        rows = self._padded(np.frombuffer(raw, np.uint8).reshape(num_blocks, self._block_bytes))
        # One array item per 16-byte piece, so that gathering one piece of each block moves 16 bytes at a time.
        pieces = rows.view(np.complex128)
        leaves = np.empty((num_blocks, _PIECE_WORDS), np.uint64)
        for first in range(0, num_blocks, _ROUND_BLOCKS):
            part = pieces[first : first + _ROUND_BLOCKS]
            leaves[first : first + len(part)] = self._chained(part)
        return leaves

    def _padded(self, rows: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """Rows padded to whole pieces as CMAC requires: a 1 bit and zeros after tokens that do not fill a piece."""
        if not self._block_bytes % _PIECE_BYTES:
            return rows
        padded = np.pad(rows, ((0, 0), (0, _PIECE_BYTES - self._block_bytes % _PIECE_BYTES)))
        padded[:, self._block_bytes] = 0x80
        return padded

    def _chained(self, pieces: npt.NDArray[np.complex128]) -> Words:
        """The CMAC chaining over each block's pieces.  Shapes:  pieces [blocks, pieces] of 16 bytes; result [blocks,
        2].
        """
        num_blocks, num_pieces = pieces.shape
        cipher = self._leaf_cipher.encryptor()
        gathered = np.empty(num_blocks, np.complex128)
        mixed = gathered.view(np.uint64)
        # The library requires an output buffer with room for one more cipher block than it fills.
        room = np.zeros(_PIECE_BYTES * (num_blocks + 1), np.uint8)
        states = room[:-_PIECE_BYTES].view(np.uint64)
        source, target = mixed.data.cast("B"), room.data
        for number in range(num_pieces):
            np.copyto(gathered, pieces[:, number])
            np.bitwise_xor(states, mixed, out=mixed)
            if number == num_pieces - 1:
                mixed.reshape(num_blocks, _PIECE_WORDS)[:] ^= self._last_mask
            cipher.update_into(source, target)
        return states.reshape(num_blocks, _PIECE_WORDS)


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
