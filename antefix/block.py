"""Names of cached things: fingerprints and keyed, chained block hashes (docs/FORMAT.md, "Names").

Two requests share KV exactly when they share fingerprint, tenant key and every token up to and including the
block. No part of a block's name is random or depends on a process: a test with fixed expected values pins the bytes.
Never sees tensors.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum, StrEnum
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from antefix.checked_files import parse_json
from antefix.errors import InvalidRequest
from antefix.lane_hashes import lane_hashes

HASH_BYTES: Final = 32
NAMES_VERSION: Final = 2
# Version of the byte layout of KV. Raising it makes every stored block a miss instead of a wrong hit.
PAYLOAD_VERSION: Final = 1
# Separates a tenant's name from a user's name. Neither may hold control characters.
USER_SEPARATOR: Final = "\x1f"
_TOKEN_DTYPE: Final = np.dtype("<u4")

TokenArray = npt.NDArray[np.uint32]
Tokens = Sequence[int] | TokenArray


class Family(StrEnum):
    """The model family that KV belongs to. OPAQUE: memory pages of another inference engine, whose layout Antefix does
    not know or parse.
    """

    V4 = "deepseek_v4"
    V41 = "deepseek_v41"
    GQA = "gqa"
    MLA = "mla"
    OPAQUE = "opaque"

    @property
    def code(self) -> int:
        """The family's number in a record's header. The number of a model family is part of the stored format, so it
        must never be changed.
        """
        return _FAMILY_CODES[self]


_FAMILY_CODES: Final = {Family.V4: 1, Family.V41: 2, Family.GQA: 3, Family.MLA: 4, Family.OPAQUE: 255}


class HashKind(IntEnum):
    """How block hashes are made. The values of this enum are part of the stored format, so they must never be
    renumbered.
    """

    CHAINED_BLAKE2B = 1
    # A hash of the name that an engine gives its block, with root and key. The engine's name stands for all tokens.
    ENGINE_KEY = 2
    # Hashes the tokens of all blocks at once and then chains their digests. Takes a third of the time.
    CHAINED_AES = 3


class Geometry(Protocol):
    """The shape of a model's blocks. Two models with equal geometries have blocks of the same shape.

    `antefix.layout.KVGeometry` is V4's.
    """

    def digest(self) -> bytes:
        """The 16 bytes that name this KV geometry."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Labels:
    """Facts in a record's header about the set-up that computed the record; they add to the record's names.
    `Fingerprint.labels` makes them.
    """

    family: int = 0
    hash_kind: HashKind = HashKind.CHAINED_AES
    num_cards: int = 1


NO_LABELS: Final = Labels()


@dataclass(frozen=True, slots=True, kw_only=True)
class Fingerprint:
    """The settings and versions that must all agree before two requests may share KV. A fingerprint's `digest` goes
    into every record, and is compared when a record is loaded.

    weights_revision: hash of the checkpoint's files.  tokenizer: hash of the tokenizer's files.
    exactness: "exact", or "bounded-K" for KV computed after an approximate replay of K windows.
    arithmetic: names the arithmetic that computed the KV. Equal names mean equal bits. Each kind of device and each
    precision has its own name of arithmetic; a GPU's fast and reproducible kernels have different names too.
    num_cards: how many GPUs computed the KV together, where the number changes bits. group: the cache group of the
    model, where an engine keeps several. shard: "rank/ranks" for a group that is split over ranks; empty if all ranks
    hold the same KV.
    """

    weights_revision: str
    geometry: Geometry
    kv_format: str
    tokenizer: str
    exactness: str = "exact"
    arithmetic: str = "cpu-float32"
    namespace: str = "default"
    family: Family = Family.V4
    num_cards: int = 1
    hash_kind: HashKind = HashKind.CHAINED_AES
    group: str = ""
    shard: str = ""

    @property
    def statement(self) -> bytes:
        """All fields as JSON. Comparing two statements shows in which fields two fingerprints differ."""
        fields = {
            "arithmetic": self.arithmetic,
            "exactness": self.exactness,
            "family": self.family.value,
            "geometry": self.geometry.digest().hex(),
            "group": self.group,
            "hash_kind": int(self.hash_kind),
            "kv_format": str(self.kv_format),
            "namespace": self.namespace,
            "num_cards": self.num_cards,
            "payload_version": PAYLOAD_VERSION,
            "shard": self.shard,
            "tokenizer": self.tokenizer,
            "version": NAMES_VERSION,
            "weights_revision": self.weights_revision,
        }
        return json.dumps(fields, sort_keys=True, separators=(",", ":")).encode("ascii")

    @property
    def digest(self) -> bytes:
        return digest_of(self.statement)

    @property
    def labels(self) -> Labels:
        return Labels(family=self.family.code, hash_kind=self.hash_kind, num_cards=self.num_cards)


# A statement of this version has half a kilobyte, and a namespace in it may be long.
STATEMENT_BYTES_MAX: Final = 1 << 14


def digest_of(statement: bytes) -> bytes:
    """The digest of a fingerprint, computed from its statement (the text with all its fields)."""
    return hashlib.blake2b(statement, digest_size=HASH_BYTES, person=b"antefix-name-v2").digest()


def fields_of(statement: bytes) -> dict[str, Any]:
    """The fields of a fingerprint's statement. Empty if it is not an object of JSON: a store's callers register
    statements, so anything may be there.
    """
    try:
        fields = parse_json(statement, "the statement") if statement else {}
    except InvalidRequest:
        return {}
    return fields if isinstance(fields, dict) else {}


def is_statement(statement: bytes) -> bool:
    """Whether this may be a fingerprint's statement, of this version or another: an object of JSON whose fields are
    texts and numbers.
    """
    fields = fields_of(statement) if len(statement) <= STATEMENT_BYTES_MAX else {}
    return bool(fields) and all(type(value) in (str, int, float, bool) for value in fields.values())


def hash_kind_of(statement: bytes) -> HashKind | None:
    """The kind of block hashes that a fingerprint's statement implies; an empty statement implies the present kind.
    None: a kind that this version does not know, or no statement of ours.
    """
    if not statement:
        return HashKind.CHAINED_AES
    kind = fields_of(statement).get("hash_kind")
    return HashKind(kind) if type(kind) is int and kind in set(HashKind) else None


def differing_fields(one: bytes, other: bytes) -> tuple[str, ...]:
    """The names of the fields in which two statements differ, in order. Both statements must have this version of the
    naming scheme.
    """
    mine, theirs = fields_of(one), fields_of(other)
    return tuple(sorted(name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name)))


CPU_FLOAT32: Final = "cpu-float32"


_REPRODUCIBLE: Final = "-reproducible"


def arithmetic_of(device: str, dtype: str, *, reproducible: bool = False) -> str:
    """The name of a set-up's arithmetic, on which KV's bits depend, such as "cpu-float32" or "cuda-bfloat16".

    device: torch's name of a device, such as "cuda:1". reproducible: the worker's setting of that name. On a CPU the
    setting `reproducible` changes nothing. On a GPU, the reproducible setting changes the name to
    "cuda-bfloat16-reproducible", because KV from the faster kernels agrees only within bounds: a hit on such KV would
    not equal a cold run bit for bit.
    """
    kind = device.partition(":")[0]
    return f"{kind}-{dtype}{_REPRODUCIBLE if reproducible and kind != 'cpu' else ''}"


# The suffix that `antefix.model.arithmetic` adds: digests of measured bits, and the numbers of threads and GPUs where
# they change bits.
_MEASURED: Final = re.compile(r"-[0-9a-f]{10}-[0-9a-f]{10}(-t[0-9]+)?(-x([1-9][0-9]{0,3}))?$")


def on_cards(num_cards: int) -> str:
    """The suffix of an arithmetic's name for `num_cards` GPUs that compute together, where the number changes bits."""
    return f"-x{num_cards}"


def cards_of(arithmetic: str) -> int:
    """How many GPUs computed together, by the arithmetic's name; 1 where the number does not change bits."""
    found = _MEASURED.search(arithmetic)
    return int(found[3]) if found and found[3] else 1


def check_arithmetic(arithmetic: str) -> str:
    """Return `arithmetic` unchanged. Raises: InvalidRequest: the name of an arithmetic is of a form that neither
    `arithmetic_of` nor a probe makes.
    """
    plain = _MEASURED.sub("", arithmetic)
    kind, _, dtype = plain.removesuffix(_REPRODUCIBLE).partition("-")
    reproducible = plain.endswith(_REPRODUCIBLE)
    is_dtype = dtype in ("float32", "bfloat16")
    if not kind.isalpha() or not is_dtype or arithmetic_of(kind, dtype, reproducible=reproducible) != plain:
        raise InvalidRequest(
            "arithmetic must be a name as `antefix doctor` prints it (a device and a dtype, and what was measured), or"
            f" {CPU_FLOAT32}, cuda-bfloat16 or cuda-bfloat16{_REPRODUCIBLE}; is {arithmetic!r}"
        )
    return arithmetic


def exactness_of(bounded_windows: int) -> str:
    """The fingerprint's `exactness`.

    bounded_windows: how many windows an approximate replay may cover in this namespace; 0: approximate replays are not
    allowed.
    """
    return f"bounded-{bounded_windows}" if bounded_windows else "exact"


def tenant_key(secret: bytes, tenant: str) -> bytes:
    """The key that a tenant's block hashes are made with; `secret` is the deployment's secret, at least 16 bytes.

    tenant: the tenant's name, optionally followed by USER_SEPARATOR and a user's name, of any length.
    Raises:  InvalidRequest: the secret is too short, or longer than BLAKE2b takes (64 bytes), or the name is not text.
    """
    if not 16 <= len(secret) <= 64:
        raise InvalidRequest(f"the deployment secret must have 16 to 64 bytes, has {len(secret)}")
    try:
        name = tenant.encode()
    except UnicodeEncodeError as err:
        raise InvalidRequest(f"a tenant's name is not text: UTF-8 cannot encode its character {err.start}") from err
    return hashlib.blake2b(name, digest_size=HASH_BYTES, key=secret, person=b"antefix-tenant").digest()


def root_of(fingerprint_digest: bytes, key: bytes) -> bytes:
    """The root hash: the parent of the first block in every chain of this fingerprint and tenant."""
    return hashlib.blake2b(fingerprint_digest, digest_size=HASH_BYTES, key=key, person=b"antefix-root").digest()


def engine_key_hash(root: bytes, engine_key: bytes, key: bytes) -> bytes:
    """The name of a block that its inference engine calls `engine_key`; the name has the hash kind ENGINE_KEY.

    The engine's name for a block must determine all tokens up to the block's end, and everything else that changes its
    KV.
    """
    return hashlib.blake2b(root + engine_key, digest_size=HASH_BYTES, key=key, person=b"antefix-enginkey").digest()


class Chain:
    """The block hashes of a growing token sequence. When a chain is extended, only the new blocks are hashed.

    `hashes[i]` names block i, tokens [i * block_size, (i + 1) * block_size). The tokens of an unfinished block have no
    hash yet.
    """

    def __init__(
        self,
        fingerprint_digest: bytes,
        key: bytes,
        block_size: int,
        kind: HashKind = HashKind.CHAINED_AES,
    ) -> None:
        """Raises:  InvalidRequest: no fingerprint or no key is given, or `kind` does not hash tokens."""
        if len(fingerprint_digest) != HASH_BYTES or not key:
            raise InvalidRequest("a chain of block hashes needs a 32-byte fingerprint and a tenant key")
        if kind is HashKind.ENGINE_KEY:
            raise InvalidRequest(
                "blocks of this kind are named by keys from their inference engine, not by hashes of tokens"
            )
        self.block_size = block_size
        self.root = root_of(fingerprint_digest, key)
        self.hashes: list[bytes] = []
        self.num_tokens = 0
        self._tail: npt.NDArray[np.uint32] = np.empty(0, _TOKEN_DTYPE)
        self._lanes = lane_hashes(self.root, key, block_size) if kind is HashKind.CHAINED_AES else None
        # Copying a keyed state skips hashing the key block again: a fifth of the work of a 128-token block.
        self._keyed = hashlib.blake2b(digest_size=HASH_BYTES, key=key, person=b"antefix-block")

    def extend(self, tokens: Tokens) -> list[bytes]:
        """Append tokens. Returns the hashes of the blocks that the added tokens complete.

        Raises:  InvalidRequest: a token is not a number in [0, 2^32).
        """
        new = as_tokens(tokens)
        self.num_tokens += len(new)
        data = np.concatenate((self._tail, new)) if len(self._tail) else new
        num_new = len(data) // self.block_size
        self._tail = data[num_new * self.block_size :].copy()
        if not num_new:
            return []
        raw = np.ascontiguousarray(data[: num_new * self.block_size]).data.cast("B")
        if self._lanes is None:
            named = self._blake2b_names(raw)
        else:
            named = self._lanes.names(self.hashes[-1] if self.hashes else None, raw)
        self.hashes += named
        return named

    def _blake2b_names(self, raw: memoryview) -> list[bytes]:
        parent = self.parent(len(self.hashes))
        names: list[bytes] = []
        copy, append = self._keyed.copy, names.append
        # One pass in C cuts the blocks. BLAKE2b itself takes three quarters of the time of a 128-token block.
        for (block,) in struct.iter_unpack(f"{self.block_size * _TOKEN_DTYPE.itemsize}s", raw):
            state = copy()
            state.update(parent + block)
            parent = state.digest()
            append(parent)
        return names

    @property
    def unfinished(self) -> TokenArray:
        """The tokens after the last complete block."""
        return self._tail

    def parent(self, index: int) -> bytes:
        """The hash before block `index`; for the first block, the hash of the chain's root."""
        return self.hashes[index - 1] if index else self.root

    def digest(self) -> bytes:
        """A hash of all tokens so far, including those of the unfinished block. It equals no block's hash."""
        state = self._keyed.copy()
        state.update(self.parent(len(self.hashes)) + self._tail.tobytes())
        return state.digest()

    def __len__(self) -> int:
        return len(self.hashes)


def as_tokens(tokens: Tokens) -> npt.NDArray[np.uint32]:
    """Token ids as little-endian u32; they are checked first, because numpy would wrap or truncate values that do not
    fit.
    """
    if isinstance(tokens, np.ndarray) and tokens.dtype == _TOKEN_DTYPE and tokens.ndim == 1:
        return tokens
    wide = np.asarray(tokens)
    if wide.size == 0:
        return np.empty(0, _TOKEN_DTYPE)
    if wide.ndim != 1 or wide.dtype.kind not in "iu":
        raise InvalidRequest("the token ids must be one flat list of integers")
    if int(wide.min()) < 0 or int(wide.max()) > 0xFFFFFFFF:
        raise InvalidRequest(f"token ids must be in [0, 2^32), found {int(wide.min())} to {int(wide.max())}")
    return wide.astype(_TOKEN_DTYPE)


def chain_of(
    tokens: Tokens,
    *,
    fingerprint_digest: bytes,
    key: bytes,
    block_size: int,
    kind: HashKind = HashKind.CHAINED_AES,
) -> Chain:
    """The chain of a whole prompt."""
    chain = Chain(fingerprint_digest, key, block_size, kind)
    chain.extend(tokens)
    return chain
