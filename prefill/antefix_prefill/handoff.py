"""A handoff's bytes: live state after any number of tokens, which prefill leaves for decode.

    offset  size  field
    0       4     magic "AFH2"
    4       4     vocab_size, u32
    8       8     position, u64
    16      8     window state's bytes, u64
    24      8     bytes of the unfinished block's row, u64 (0 at a block boundary)
    32      32    digest of the prompt
    64      ...   window state, row, then vocab_size float32 logits of the last token

This module checks only the shape of a handoff. The store checks the payload's integrity and the fingerprint.
Little-endian.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from antefix.errors import BlockCorrupt

_HEADER = struct.Struct("<4sIQQQ32s")
_MAGIC = b"AFH2"


@dataclass(frozen=True, slots=True, kw_only=True)
class Handoff:
    """The state that a decode worker needs in addition to the finished blocks. logits: [vocab_size] float32.

    prompt: `Chain.digest` of the tokens from which the handoff was made. A handoff must not be used for any prompt but
    its own.
    """

    position: int
    prompt: bytes
    window: bytes
    partial_row: bytes
    logits: npt.NDArray[np.float32]

    def to_bytes(self) -> bytes:
        sizes = len(self.logits), self.position, len(self.window), len(self.partial_row)
        header = _HEADER.pack(_MAGIC, *sizes, self.prompt)
        return b"".join((header, self.window, self.partial_row, self.logits.astype("<f4").tobytes()))

    @classmethod
    def from_bytes(cls, data: bytes) -> Handoff:
        """Raises:  BlockCorrupt: not a handoff, or its parts do not add up."""
        if len(data) < _HEADER.size:
            raise BlockCorrupt(f"a handoff must have at least {_HEADER.size} bytes, this handoff has {len(data)}")
        magic, vocab_size, position, window_bytes, row_bytes, prompt = _HEADER.unpack_from(data)
        if magic != _MAGIC or len(data) != _HEADER.size + window_bytes + row_bytes + 4 * vocab_size:
            raise BlockCorrupt("the lengths in a handoff's header do not add up to the handoff's length")
        row_at = _HEADER.size + window_bytes
        return cls(
            position=position,
            prompt=prompt,
            window=data[_HEADER.size : row_at],
            partial_row=data[row_at : row_at + row_bytes],
            logits=np.frombuffer(data, "<f4", vocab_size, row_at + row_bytes).astype(np.float32),
        )
