"""Block hashes of hash kind 3: all blocks' tokens hashed at once, their digests chained (docs/FORMAT.md, "Names").

A call for each block costs more than the hashing of 128 tokens, so here a prompt takes some dozen calls in all, each
for one piece of 16 bytes of every block. Both parts are standard MACs under keys of the tenant: AES-CMAC (NIST SP
800-38B) of each block's tokens, encrypted CBC-MAC (ISO/IEC 9797-1, algorithm 2) of the digests so far. Who has a key
can make two names equal; docs/FORMAT.md says who that is, and why no hash without keys is used.
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
_NO_STATE: Final = bytes(_PIECE_BYTES)
# Blocks at a time: their states stay in a core's cache. Measured for blocks of 512 bytes, all leaves of a prompt of 1M
# tokens: 512 blocks 2.3 ms, 1024 1.8, 2048 1.5, 4096 1.3, all 7813 1.25. With all pieces turned over first: 1.55.
_ROUND_BLOCKS: Final = 8192
# Of SP 800-38B, for blocks of 128 bits.
_CMAC_POLYNOMIAL: Final = 0x87


class LaneHashes:
    """Names blocks behind one root. Immutable; thread-safe.

    Each block's tokens become 16 bytes, by AES-CMAC. Two lanes chain those by CBC, each under a key of its own. A name
    is both lanes' state, encrypted once more, so that no name shows a state, and who has the keys can continue from any
    name.
    """

    def __init__(self, root: bytes, key: bytes, block_size: int) -> None:
        keys = {label: _key(root, key, block_size, label) for label in ("leaf", "c0", "c1", "n0", "n1")}
        self._leaf_key = keys["leaf"]
        self._lanes = ((keys["c0"], keys["n0"]), (keys["c1"], keys["n1"]))
        self._block_bytes = 4 * block_size
        self._last_mask = np.frombuffer(
            _last_mask(self._leaf_key, is_whole=not self._block_bytes % _PIECE_BYTES), np.uint64
        )

    def names(self, parent: bytes | None, raw: memoryview) -> list[bytes]:
        """The hashes of consecutive blocks, of which `raw` holds the tokens (u32, little-endian).

        parent: the hash of the block before; None: these are the first.
        """
        num_blocks = raw.nbytes // self._block_bytes
        leaves = self._leaves(raw, num_blocks).data.cast("B")
        names = np.empty((num_blocks, len(self._lanes)), np.complex128)
        for lane, (chain_key, name_key) in enumerate(self._lanes):
            state = _NO_STATE if parent is None else _decrypt(name_key, parent[lane * _PIECE_BYTES :][:_PIECE_BYTES])
            states = Cipher(algorithms.AES(chain_key), modes.CBC(state)).encryptor().update(leaves)
            names[:, lane] = np.frombuffer(_encrypt(name_key, states), np.complex128)
        # One pass in C cuts them.
        named: list[bytes] = names.view("V32").reshape(-1).tolist()
        return named

    def _leaves(self, raw: memoryview, num_blocks: int) -> Words:
        """AES-CMAC of each block's tokens.  Shapes:  [num_blocks, 2]."""
        rows = self._padded(np.frombuffer(raw, np.uint8).reshape(num_blocks, self._block_bytes))
        # One item per piece, so that gathering one of each block moves 16 bytes at a time.
        pieces = rows.view(np.complex128)
        leaves = np.empty((num_blocks, _PIECE_WORDS), np.uint64)
        for first in range(0, num_blocks, _ROUND_BLOCKS):
            part = pieces[first : first + _ROUND_BLOCKS]
            leaves[first : first + len(part)] = self._chained(part)
        return leaves

    def _padded(self, rows: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """Rows of whole pieces: a bit of one and zeros behind tokens that fill none, as CMAC has it."""
        if not self._block_bytes % _PIECE_BYTES:
            return rows
        padded = np.pad(rows, ((0, 0), (0, _PIECE_BYTES - self._block_bytes % _PIECE_BYTES)))
        padded[:, self._block_bytes] = 0x80
        return padded

    def _chained(self, pieces: npt.NDArray[np.complex128]) -> Words:
        """Shapes:  pieces [blocks, pieces] of 16 bytes; result [blocks, 2]."""
        num_blocks, num_pieces = pieces.shape
        cipher = Cipher(algorithms.AES(self._leaf_key), modes.ECB()).encryptor()
        gathered = np.empty(num_blocks, np.complex128)
        mixed = gathered.view(np.uint64)
        # The library wants room for one more block than it fills.
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
    """Made once for a root: its keys cost more than a short prompt's names."""
    return LaneHashes(root, key, block_size)


def _last_mask(key: bytes, *, is_whole: bool) -> bytes:
    """K1 or K2 of CMAC, for messages that do or do not end with a whole piece."""
    mask = int.from_bytes(_encrypt(key, bytes(_PIECE_BYTES)), "big")
    for _ in range(1 if is_whole else 2):
        mask <<= 1
        if mask >> 128:
            mask = (mask ^ _CMAC_POLYNOMIAL) & (2**128 - 1)
    return mask.to_bytes(_PIECE_BYTES, "big")


def _key(root: bytes, key: bytes, block_size: int, label: str) -> bytes:
    of = root + block_size.to_bytes(4, "little") + label.encode()
    return hashlib.blake2b(of, digest_size=_KEY_BYTES, key=key, person=b"antefix-lanes").digest()


def _encrypt(key: bytes, data: bytes) -> bytes:
    return Cipher(algorithms.AES(key), modes.ECB()).encryptor().update(data)


def _decrypt(key: bytes, data: bytes) -> bytes:
    return Cipher(algorithms.AES(key), modes.ECB()).decryptor().update(data)
