"""One pool's pages as records: blocks if a prefix needs all of the pages, checkpoints if only its end needs them.

SGLang keeps pools apart and writes them at different times, so each is a separate chain, with its own fingerprint:

    all pages         a block per page: a lookup is the longest prefix that is stored
    trailing pages    (window, states) a block of one byte per page of the prefix, and a checkpoint where the page is
                      stored: one lookup says at which of all boundaries it can be restored

A page's name is made from SGLang's own key, a SHA-256 chain over tokens that begins with cache_salt and LoRA. The key
of the page before must be known: a store keeps a block only if it has the block before it, so that a lookup is one
search and not one search per page.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from antefix.block import Family, Fingerprint, HashKind
from antefix.record import LookupResult, Record
from antefix_engines.engine_layout import EngineLayout, Part, plain_rows
from antefix_engines.engine_store import EngineStore, KvOfModel
from antefix_engines.sglang.pages import PageMemory

_EMPTY = bytes(1)


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolName:
    """What the names of a pool's pages include, besides the layout. shard: empty where all ranks have the same
    pages.
    """

    pool: str
    is_trailing: bool
    weights_revision: str
    kv_format: str
    arithmetic: str
    namespace: str
    shard: str
    page_size: int
    page_bytes: int
    description: str

    def layout(self) -> EngineLayout:
        is_v4 = self.pool.startswith("deepseek_v4")
        page = (
            Part(
                layer=0,
                group=self.pool,
                num_rows=1,
                record=plain_rows(self.page_bytes, 1),
                dtype=self.description,
            ),
        )
        parts = page if self.page_bytes else ()
        return EngineLayout(
            engine="sglang",
            family=Family.V4 if is_v4 else Family.OPAQUE,
            block_size=self.page_size,
            block=() if self.is_trailing else parts,
            checkpoint=parts if self.is_trailing else (),
            num_checkpoints=int(self.is_trailing and bool(parts)),
        )

    def fingerprint(self, layout: EngineLayout) -> Fingerprint:
        return Fingerprint(
            weights_revision=self.weights_revision,
            geometry=layout,
            kv_format=self.kv_format,
            tokenizer="",
            arithmetic=self.arithmetic,
            namespace=self.namespace,
            family=layout.family,
            hash_kind=HashKind.ENGINE_KEY,
            group=self.pool,
            shard=self.shard,
        )


class PoolRecords:
    """The records of one pool. Calls come from SGLang's threads and may wait for the store."""

    def __init__(self, store: EngineStore, name: PoolName) -> None:
        layout = name.layout()
        self.name = name
        self.kv: KvOfModel = store.kv(name.fingerprint(layout), layout)

    def lookup(self, keys: Sequence[str]) -> LookupResult:
        """How many of the first keys are stored, and after which of them there is a trailing page."""
        return self.kv.lookup(self._hashes(keys))

    def get(self, keys: Sequence[str], pages: Sequence[PageMemory]) -> list[bool]:
        """Fill pages. Returns which pages passed all checks; the content of the others is undefined."""
        if self.name.is_trailing:
            return [self._get_trailing(name, page) for name, page in zip(self._hashes(keys), pages, strict=True)]
        landed = [page.landing() if page.runs else memoryview(bytearray(_EMPTY)) for page in pages]
        num_good = self.kv.get_blocks(self._hashes(keys), landed)
        for page, payload in zip(pages[:num_good], landed, strict=False):
            page.settle(payload)
        return [index < num_good for index in range(len(keys))]

    def _get_trailing(self, name: bytes, page: PageMemory) -> bool:
        payload = self.kv.get_checkpoint(name)
        if payload is None:
            return False
        page.fill(payload)
        return True

    def put(self, keys: Sequence[str], pages: Sequence[PageMemory], prefix: Sequence[str]) -> list[bool]:
        """Store pages that directly follow `prefix`. Returns which of the pages the store has now."""
        hashes = self._hashes([*prefix, *keys])
        first = len(prefix)
        if self.name.is_trailing:
            return self._put_trailing(hashes, first, pages)
        records = [
            self._block(hashes, first + i, page.payload() if page.runs else _EMPTY) for i, page in enumerate(pages)
        ]
        return self.kv.put_each(records)

    def _put_trailing(self, hashes: Sequence[bytes], first: int, pages: Sequence[PageMemory]) -> list[bool]:
        known = self.kv.lookup(hashes).num_blocks
        records = [self._block(hashes, index, _EMPTY) for index in range(known, len(hashes))]
        num_blocks = len(records)
        for index, page in enumerate(pages, first):
            parent = hashes[index - 1] if index else self.kv.root
            records.append(self.kv.checkpoint(hashes[index], parent, self._end(index), page.payload()))
        return self.kv.put_each(records)[num_blocks:]

    def _block(self, hashes: Sequence[bytes], index: int, payload: memoryview | bytes) -> Record:
        parent = hashes[index - 1] if index else self.kv.root
        return self.kv.block(hashes[index], parent, self._end(index), payload)

    def _end(self, index: int) -> int:
        return (index + 1) * self.name.page_size

    def _hashes(self, keys: Sequence[str]) -> list[bytes]:
        return [self.kv.hash_of(key.encode()) for key in keys]
