"""Block hashes of hash kind 3: all blocks' tokens hashed at once, their digests chained (docs/FORMAT.md, "Names").

A call for each block costs more than the hashing of 128 tokens, so here a prompt takes a few calls in all, whatever its
length. AES under keys of the tenant: as sound as a MAC, for everybody who has no key; who has one needs no collision.
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
# Tokens at a time: what is worked on stays in a core's cache, and malloc need not ask the kernel for it. Measured:
# 32 KiB took 1.5 times as long, 256 KiB as long, but twice as long for prompts of 128K tokens.
_ROUND_BYTES: Final = 120 << 10


class LaneHashes:
    """Names blocks behind one root. Immutable; thread-safe.

    Each block's tokens, as pieces of 16 bytes under masks of their own, are encrypted and added up (XOR) to 16 bytes.
    Two lanes chain those by CBC, each under a key of its own. A name is both lanes' state, encrypted once more, so that
    no name shows a state, and who has the keys can go on from any name.
    """

    def __init__(self, root: bytes, key: bytes, block_size: int) -> None:
        keys = {label: _key(root, key, block_size, label) for label in ("leaf", "mask", "c0", "c1", "n0", "n1")}
        self._leaf_key = keys["leaf"]
        self._lanes = ((keys["c0"], keys["n0"]), (keys["c1"], keys["n1"]))
        self._block_bytes = 4 * block_size
        num_pieces = -(-self._block_bytes // _PIECE_BYTES)
        counters = b"".join(number.to_bytes(_PIECE_BYTES, "little") for number in range(num_pieces))
        self._masks = np.frombuffer(_encrypt(keys["mask"], counters), np.uint64)

    def names(self, parent: bytes | None, raw: memoryview) -> list[bytes]:
        """The hashes of consecutive blocks, of which `raw` holds the tokens (u32, little-endian).

        parent: the hash of the block before; None: these are the first.
        """
        num_blocks = raw.nbytes // self._block_bytes
        leaves = self._leaves(raw, num_blocks).data.cast("B")
        names = np.empty((num_blocks, 2, _PIECE_BYTES), np.uint8)
        for lane, (chain_key, name_key) in enumerate(self._lanes):
            state = _NO_STATE if parent is None else _decrypt(name_key, parent[lane * _PIECE_BYTES :][:_PIECE_BYTES])
            states = Cipher(algorithms.AES(chain_key), modes.CBC(state)).encryptor().update(leaves)
            names[:, lane] = np.frombuffer(_encrypt(name_key, states), np.uint8).reshape(num_blocks, _PIECE_BYTES)
        # One pass in C cuts them.
        named: list[bytes] = names.reshape(num_blocks, 2 * _PIECE_BYTES).view("V32").reshape(-1).tolist()
        return named

    def _leaves(self, raw: memoryview, num_blocks: int) -> Words:
        """Shapes:  [num_blocks, 2]: of each block, 16 bytes that stand for its tokens."""
        rows = np.frombuffer(raw, np.uint8).reshape(num_blocks, self._block_bytes)
        padded_bytes = 8 * len(self._masks)
        if padded_bytes != self._block_bytes:
            rows = np.pad(rows, ((0, 0), (0, padded_bytes - self._block_bytes)))
        tokens = rows.view(np.uint64)
        leaves = np.empty((num_blocks, _PIECE_WORDS), np.uint64)
        step = max(1, _ROUND_BYTES // padded_bytes)
        cipher = Cipher(algorithms.AES(self._leaf_key), modes.ECB()).encryptor()
        masked = np.empty((min(step, num_blocks), len(self._masks)), np.uint64)
        # The library wants room for one more block than it fills.
        coded = np.empty(masked.nbytes + _PIECE_BYTES, np.uint8)
        for first in range(0, num_blocks, step):
            part = tokens[first : first + step]
            np.bitwise_xor(part, self._masks, out=masked[: len(part)])
            cipher.update_into(masked[: len(part)].data.cast("B"), coded.data)
            pieces = coded[: part.nbytes].view(np.uint64).reshape(part.shape)
            leaves[first : first + step] = _sum_of_pieces(pieces)
        return leaves


@functools.lru_cache(1024)
def lane_hashes(root: bytes, key: bytes, block_size: int) -> LaneHashes:
    """Made once for a root: its keys cost more than a short prompt's names."""
    return LaneHashes(root, key, block_size)


def _sum_of_pieces(pieces: Words) -> Words:
    """XOR over the pieces of each row. Halves, as numpy takes ten times as long for a sum over so short an axis."""
    while pieces.shape[1] > _PIECE_WORDS:
        half = pieces.shape[1] // (2 * _PIECE_WORDS) * _PIECE_WORDS
        added = pieces[:, :half] ^ pieces[:, half : 2 * half]
        if 2 * half < pieces.shape[1]:
            added[:, :_PIECE_WORDS] ^= pieces[:, 2 * half :]
        pieces = added
    return pieces


def _key(root: bytes, key: bytes, block_size: int, label: str) -> bytes:
    of = root + block_size.to_bytes(4, "little") + label.encode()
    return hashlib.blake2b(of, digest_size=_KEY_BYTES, key=key, person=b"antefix-lanes").digest()


def _encrypt(key: bytes, data: bytes) -> bytes:
    return Cipher(algorithms.AES(key), modes.ECB()).encryptor().update(data)


def _decrypt(key: bytes, data: bytes) -> bytes:
    return Cipher(algorithms.AES(key), modes.ECB()).decryptor().update(data)
