"""Which names a rebuild may have indexed already, in memory of at most 8 MiB."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from antefix.record import RecordKind
from antefix.store_files.record_format import HASH_BYTES

Array = npt.NDArray[Any]

_FILTER_BITS_MIN: Final = 13
_FILTER_BITS_MAX: Final = 26


class SeenNames:
    """A Bloom filter over indexed names, so that the index is rarely searched for names that it lacks.

    Two bits of 16 or more per name, of 64 Mi at most: of ten million names, 7% are searched for needlessly; of a
    hundred million, most.
    """

    def __init__(self, num_names_max: int) -> None:
        """num_names_max: more names can be added, but then more are searched for needlessly."""
        num_bits = min(_FILTER_BITS_MAX, max(_FILTER_BITS_MIN, (16 * num_names_max).bit_length()))
        self._bits = np.zeros(1 << (num_bits - 3), np.uint8)
        self._mask = np.uint64((1 << num_bits) - 1)

    def have(self, rows: Array) -> Array:
        """Shapes:  [N] bool."""
        found = np.ones(len(rows), bool)
        for places in self._places(rows):
            found &= (self._bits[places >> 3] >> (places & 7).astype(np.uint8) & 1).astype(bool)
        return found

    def add(self, rows: Array) -> None:
        for places in self._places(rows):
            np.bitwise_or.at(self._bits, places >> 3, np.left_shift(1, places & 7).astype(np.uint8))

    def _places(self, rows: Array) -> Iterator[Array]:
        """Hashes are uniform, so their bytes serve as bit numbers. A checkpoint has its block's hash, so other bytes
        are used.
        """
        words = np.ascontiguousarray(rows["hash"]).view("<u8").reshape(len(rows), HASH_BYTES // 8)
        is_block = rows["kind"] == RecordKind.BLOCK
        for of_block, of_checkpoint in ((0, 2), (1, 3)):
            chosen = np.where(is_block, words[:, of_block], words[:, of_checkpoint])
            yield (chosen & self._mask).astype(np.int64)
