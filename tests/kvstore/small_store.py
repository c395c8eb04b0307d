"""Small stores with payloads of a few hundred bytes, so that a test of a whole store takes milliseconds."""

from __future__ import annotations

from antefix.block import Chain, HashKind, chain_of
from antefix.record import OWNER_BYTES, Record, RecordKind
from antefix_kvstore.storage_engine import StorageEngine

FINGERPRINT = b"F" * 32
BLOCK = 8


def owner(name: str) -> bytes:
    """An owner for tests without a secret, made from a short tenant name, without a user."""
    return name.encode().ljust(OWNER_BYTES, b"\0")


class Prompt:
    """A chain with one payload per block.  version: the format version of its records."""

    def __init__(
        self, tokens: list[int], *, payload_bytes: int = 300, fingerprint: bytes = FINGERPRINT, version: int = 2
    ) -> None:
        self.fingerprint = fingerprint
        self.version = version
        self.chain: Chain = chain_of(
            tokens,
            fingerprint_digest=fingerprint,
            key=b"k" * 32,
            block_size=BLOCK,
            # The golden stores have the same payloads.
            kind=HashKind.CHAINED_BLAKE2B,
        )
        self.hashes = self.chain.hashes
        self.payload_bytes = payload_bytes

    def payload(self, index: int, kind: RecordKind = RecordKind.BLOCK) -> bytes:
        """A payload that differs from block to block and depends only on the block's name."""
        seed = self.hashes[index] + bytes([kind])
        return (seed * (self.payload_bytes // len(seed) + 1))[: self.payload_bytes]

    def block(self, index: int, **changes: object) -> Record:
        fields: dict[str, object] = {
            "kind": RecordKind.BLOCK,
            "hash": self.hashes[index],
            "parent": self.chain.parent(index),
            "fingerprint": self.fingerprint,
            "position": (index + 1) * BLOCK,
            "payload": self.payload(index),
            "version": self.version,
            "tenant": b"" if self.version == 1 else owner(""),
        }
        return Record(**{**fields, **changes})  # type: ignore[arg-type]

    def checkpoint(self, index: int, **changes: object) -> Record:
        payload = self.payload(index, RecordKind.CHECKPOINT)
        return self.block(index, **{"kind": RecordKind.CHECKPOINT, "payload": payload, **changes})

    def blocks(self, stop: int | None = None) -> list[Record]:
        return [self.block(i) for i in range(len(self.hashes) if stop is None else stop)]

    def buffers(self, count: int | None = None) -> list[memoryview]:
        n = len(self.hashes) if count is None else count
        return [memoryview(bytearray(self.payload_bytes)) for _ in range(n)]

    def check(self, engine: StorageEngine) -> int:
        """Read all blocks of this prompt that the look-up reports. Every byte must be right.

        Returns the number of blocks.
        """
        found = engine.lookup(self.hashes, fingerprint=self.fingerprint)
        into = self.buffers(found.num_blocks)
        outcome = engine.read_blocks(self.hashes[: found.num_blocks], into, fingerprint=self.fingerprint)
        assert [bytes(b) for b in into[: outcome.num_good]] == [self.payload(i) for i in range(outcome.num_good)]
        return outcome.num_good


class Clock:
    """A clock in milliseconds that only the test advances."""

    def __init__(self) -> None:
        self.ms = 1_700_000_000_000

    def __call__(self) -> int:
        return self.ms

    def advance(self, seconds: float) -> None:
        self.ms += round(seconds * 1000)
