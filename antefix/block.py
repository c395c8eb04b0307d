"""Names of cached things: fingerprints and keyed, chained block hashes (docs/ARCHITECTURE.md, "Names").

Two requests share KV exactly when they share fingerprint, tenant key and every token up to and including the
block. Nothing here is random or depends on a process: the golden test pins the bytes. Never sees tensors.
"""

from __future__ import annotations

import hashlib
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from antefix.errors import InvalidRequest
from antefix.layout import KVFormat, KVGeometry

HASH_BYTES: Final = 32
# Version of how KV is written down; raising it makes every stored block a miss instead of a wrong hit.
RECORD_VERSION: Final = 1
_TOKEN_DTYPE: Final = np.dtype("<u4")

TokenArray = npt.NDArray[np.uint32]
Tokens = Sequence[int] | TokenArray


@dataclass(frozen=True, slots=True, kw_only=True)
class Fingerprint:
    """All that must agree before KV may be shared. `digest` goes into every record and is compared at load.

    weights_revision: hash of the checkpoint's files.  tokenizer: hash of the tokenizer's files.
    exactness: "exact", or "bounded-K" for KV computed after an approximate replay of K windows; and what computed it,
    if that was not a CPU in float32: no two kinds of device or precision give the same bits, nor do a card's fast and
    reproducible kernels.
    """

    weights_revision: str
    geometry: KVGeometry
    kv_format: KVFormat
    tokenizer: str
    exactness: str = "exact"
    namespace: str = "default"

    @property
    def digest(self) -> bytes:
        state = hashlib.blake2b(digest_size=HASH_BYTES, person=b"antefix-fingerpr")
        for part in (
            self.weights_revision.encode(),
            self.geometry.digest(),
            self.kv_format.value.encode(),
            str(RECORD_VERSION).encode(),
            self.tokenizer.encode(),
            self.exactness.encode(),
            self.namespace.encode(),
        ):
            # Length first: without it ("ab", "c") and ("a", "bc") would share a name.
            state.update(len(part).to_bytes(4, "little"))
            state.update(part)
        return state.digest()


CPU_FLOAT32: Final = "cpu-float32"


_REPRODUCIBLE: Final = "-reproducible"


def arithmetic_of(device: str, dtype: str, *, reproducible: bool = False) -> str:
    """What computes, as far as KV's bits hang on it: "cpu-float32", "cuda-bfloat16". device: torch's name, "cuda:1".

    reproducible: the setting of that name. A CPU is so anyway; a card then is "cuda-bfloat16-reproducible": KV that the
    faster kernels wrote is good within bounds only, and a hit on it would not equal a cold run to the bit.
    """
    kind = device.partition(":")[0]
    return f"{kind}-{dtype}{_REPRODUCIBLE if reproducible and kind != 'cpu' else ''}"


# What `antefix.model.arithmetic` adds to a name: digests of the bits, and the threads where they matter.
_MEASURED: Final = re.compile(r"-[0-9a-f]{10}-[0-9a-f]{10}(-t[0-9]+)?$")


def check_arithmetic(arithmetic: str) -> str:
    """The same.  Raises:  InvalidRequest: neither `arithmetic_of` nor a probe makes such a name."""
    plain = _MEASURED.sub("", arithmetic)
    kind, _, dtype = plain.removesuffix(_REPRODUCIBLE).partition("-")
    reproducible = plain.endswith(_REPRODUCIBLE)
    is_dtype = dtype in ("float32", "bfloat16")
    if not kind.isalpha() or not is_dtype or arithmetic_of(kind, dtype, reproducible=reproducible) != plain:
        raise InvalidRequest(
            f"arithmetic is a device and a dtype, and what was measured, as `antefix doctor` prints it, or"
            f" {CPU_FLOAT32}, cuda-bfloat16, cuda-bfloat16{_REPRODUCIBLE}; is {arithmetic!r}"
        )
    return arithmetic


def exactness_of(bounded_windows: int, arithmetic: str = CPU_FLOAT32) -> str:
    """The fingerprint's `exactness`: who may take whose KV for its own.

    bounded_windows: of approximate replays that the namespace allows; 0: none.  arithmetic: as `arithmetic_of` has it.
    """
    exactness = f"bounded-{bounded_windows}" if bounded_windows else "exact"
    return exactness if arithmetic == CPU_FLOAT32 else f"{exactness}-{arithmetic}"


def tenant_key(secret: bytes, tenant: str) -> bytes:
    """The key that a tenant's block hashes are made with; `secret` is the deployment's, at least 16 bytes.

    Raises:  InvalidRequest: the secret is too short, or longer than BLAKE2b takes (64 bytes).
    """
    if not 16 <= len(secret) <= 64:
        raise InvalidRequest(f"the deployment secret must have 16 to 64 bytes, has {len(secret)}")
    return hashlib.blake2b(tenant.encode(), digest_size=HASH_BYTES, key=secret, person=b"antefix-tenant").digest()


class Chain:
    """The block hashes of a growing token sequence. Extending hashes the new blocks only.

    `hashes[i]` names block i, tokens [i * block_size, (i + 1) * block_size); the tokens of an unfinished block wait.
    """

    def __init__(self, fingerprint_digest: bytes, key: bytes, block_size: int) -> None:
        if len(fingerprint_digest) != HASH_BYTES or not key:
            raise InvalidRequest("a chain needs a 32-byte fingerprint and a tenant key")
        self.block_size = block_size
        self.root = hashlib.blake2b(
            fingerprint_digest, digest_size=HASH_BYTES, key=key, person=b"antefix-root"
        ).digest()
        self.hashes: list[bytes] = []
        self.num_tokens = 0
        self._tail: npt.NDArray[np.uint32] = np.empty(0, _TOKEN_DTYPE)
        # Copying a keyed state skips hashing the key block again: a fifth of the work of a 128-token block.
        self._keyed = hashlib.blake2b(digest_size=HASH_BYTES, key=key, person=b"antefix-block")

    def extend(self, tokens: Tokens) -> list[bytes]:
        """Append tokens; returns the hashes of the blocks that this completed.

        Raises:  InvalidRequest: a token is not a number in [0, 2^32).
        """
        new = as_tokens(tokens)
        self.num_tokens += len(new)
        data = np.concatenate((self._tail, new)) if len(self._tail) else new
        num_new = len(data) // self.block_size
        self._tail = data[num_new * self.block_size :].copy()
        raw = np.ascontiguousarray(data[: num_new * self.block_size]).data
        parent = self.hashes[-1] if self.hashes else self.root
        first = len(self.hashes)
        copy, append = self._keyed.copy, self.hashes.append
        # One pass in C cuts the blocks. Of a 128-token block's time three quarters are BLAKE2b itself.
        for (block,) in struct.iter_unpack(f"{self.block_size * _TOKEN_DTYPE.itemsize}s", raw):
            state = copy()
            state.update(parent + block)
            parent = state.digest()
            append(parent)
        return self.hashes[first:]

    def parent(self, index: int) -> bytes:
        """The hash before block `index`: the root for the first."""
        return self.hashes[index - 1] if index else self.root

    def digest(self) -> bytes:
        """The name of all tokens so far, those of the unfinished block too. No block has it: those are whole."""
        state = self._keyed.copy()
        state.update(self.parent(len(self.hashes)) + self._tail.tobytes())
        return state.digest()

    def __len__(self) -> int:
        return len(self.hashes)


def as_tokens(tokens: Tokens) -> npt.NDArray[np.uint32]:
    """Token ids as little-endian u32, checked: numpy would wrap or truncate what does not fit."""
    if isinstance(tokens, np.ndarray) and tokens.dtype == _TOKEN_DTYPE and tokens.ndim == 1:
        return tokens
    wide = np.asarray(tokens)
    if wide.size == 0:
        return np.empty(0, _TOKEN_DTYPE)
    if wide.ndim != 1 or wide.dtype.kind not in "iu":
        raise InvalidRequest("tokens must be one flat list of integers")
    if int(wide.min()) < 0 or int(wide.max()) > 0xFFFFFFFF:
        raise InvalidRequest(f"token ids must be in [0, 2^32), found {int(wide.min())} to {int(wide.max())}")
    return wide.astype(_TOKEN_DTYPE)


def chain_of(tokens: Tokens, *, fingerprint_digest: bytes, key: bytes, block_size: int) -> Chain:
    """The chain of a whole prompt."""
    chain = Chain(fingerprint_digest, key, block_size)
    chain.extend(tokens)
    return chain
