"""Tracks which blocks one engine (one data-parallel rank) holds, by its KV events, and enters them into the directory
under our block names.

In the directory, the engine has one entry for the blocks in any of its media, and one entry per medium. A model may
keep several cache groups. Groups of full attention must hold every block of a prefix. Groups of a sliding window, of
state, or with blocks of another size must hold only what is needed at the prefix's end. So a hit ends at the last block
at which every group has the data that it needs. An engine uses the same hash for a position in all groups.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from antefix.events.block_events import Key, keys_of
from antefix.events.kv_events import GROUPS_MAX, MEDIA, Hash, KvBatch, KvCleared, KvRemoved, KvStored, medium_of
from antefix_router.fleet.fleet_names import FleetNames, scope_of
from antefix_router.placement.directory import Directory

_FULL_KINDS: Final = frozenset({None, "full_attention", "mla_attention", "sink_full_attention"})
# The limit for one engine. At 16 tokens per block this is 64 million tokens, far more than a machine's memory holds.
NUM_BLOCKS_MAX: Final = 1 << 22
_ALL_GROUPS: Final = (1 << GROUPS_MAX) - 1


class _Held:
    """One of the engine's blocks.  name: our name; empty if only window groups have reported the block.  groups: the
    groups that hold it, one bit each, with GROUPS_MAX bits per medium.
    """

    __slots__ = ("groups", "name", "scope")

    def __init__(self) -> None:
        self.name = b""
        self.scope = ""
        # One number for all media, because Python stores small numbers without extra memory.
        self.groups = 0

    def among(self, medium: int) -> int:
        """The groups that hold the block in this medium, as bits."""
        return self.groups >> (medium * GROUPS_MAX) & _ALL_GROUPS

    def is_whole(self, medium: int, groups: int) -> bool:
        return self.among(medium) & groups == groups


class GoneBlocks:
    """Blocks that engines dropped, which are remembered so that a later miss can be explained. The memory is bounded:
    when it is full, the older half is forgotten.
    """

    def __init__(self, num_blocks_max: int = 1 << 20) -> None:
        self._half = num_blocks_max // 2
        self._young: set[Key] = set()
        self._old: set[Key] = set()

    def __contains__(self, key: Key) -> bool:
        return key in self._young or key in self._old

    def add(self, keys: Iterable[Key]) -> None:
        self._young.update(keys)
        if len(self._young) > self._half:
            self._old, self._young = self._young, set()


class EngineIndex:
    """address: the engine's name in the directory. block_size: tokens per block of its full-attention groups; 0: not
    reported yet.
    """

    def __init__(
        self,
        address: str,
        directory: Directory,
        names: FleetNames,
        *,
        gone: GoneBlocks | None = None,
        num_blocks_max: int = NUM_BLOCKS_MAX,
    ) -> None:
        self.address = address
        self.block_size = 0
        self.num_unnamed = 0
        self._directory = directory
        self._names = names
        self._gone = gone or GoneBlocks()
        self._num_blocks_max = num_blocks_max
        self._blocks: dict[int, _Held] = {}
        self._is_confirmed = False
        self._full = 0
        self._window = 0
        # The blocks at which all window groups hold what a hit that ends there needs.
        self._window_ends: set[Key] = set()

    def __len__(self) -> int:
        return len(self._blocks)

    @property
    def media(self) -> tuple[str, ...]:
        """The names of the block's holders in the directory, nearest medium first."""
        return tuple(f"{self.address}|{medium}" for medium in MEDIA)

    @property
    def has_window_groups(self) -> bool:
        return bool(self._window)

    def num_usable(self, num_leading: int, keys: Sequence[Key]) -> int:
        """How many of these leading blocks a hit can use, since it must end where all window groups hold the blocks
        that they need.
        """
        if self._window:
            while num_leading and keys[num_leading - 1] not in self._window_ends:
                num_leading -= 1
        return num_leading

    def apply(self, batch: KvBatch) -> None:
        for event in batch.events:
            if isinstance(event, KvStored):
                self._stored(event)
            elif isinstance(event, KvRemoved):
                self._removed(event)
            elif isinstance(event, KvCleared):
                self.forget()

    def forget(self) -> None:
        self._blocks.clear()
        self._window_ends.clear()
        for holder in (self.address, *self.media):
            self._directory.forget(holder)
        if self._is_confirmed:
            self.confirm()

    def confirm(self) -> None:
        self._is_confirmed = True
        self._directory.know(self.address)

    def doubt(self) -> None:
        self._is_confirmed = False
        self._directory.doubt(self.address)

    def _stored(self, event: KvStored) -> None:
        bit, medium = 1 << (event.group_idx or 0), MEDIA.index(medium_of(event))
        is_full = event.kv_cache_spec_kind in _FULL_KINDS
        if is_full and not self.block_size:
            self.block_size = event.block_size
        if not is_full or event.block_size != self.block_size:
            self._window |= bit
            for hash_ in event.block_hashes:
                self._hold(_number(hash_), bit, medium)
            return
        self._full |= bit
        scope, named = self._named(event)
        self.num_unnamed += len(event.block_hashes) - len(named)
        there = []
        for hash_, name in zip(event.block_hashes, named, strict=False):
            held = self._blocks.setdefault(_number(hash_), _Held())
            held.name, held.scope = name, scope
            self._hold(_number(hash_), bit, medium)
            if held.is_whole(medium, self._full):
                there.append(name)
        for holder in (self.address, self.media[medium]):
            self._directory.placed(holder, keys_of(there))
        if len(self._blocks) > self._num_blocks_max:
            self.forget()

    def _hold(self, number: int, bit: int, medium: int) -> _Held:
        held = self._blocks.setdefault(number, _Held())
        held.groups |= bit << (medium * GROUPS_MAX)
        self._note_window(held)
        return held

    def _note_window(self, held: _Held) -> None:
        if not self._window or not held.name:
            return
        groups = held.among(0) | held.among(1) | held.among(2)
        (key,) = keys_of([held.name])
        if groups & self._window == self._window:
            self._window_ends.add(key)
        else:
            self._window_ends.discard(key)

    def _removed(self, event: KvRemoved) -> None:
        bit, medium = 1 << (event.group_idx or 0), MEDIA.index(medium_of(event))
        gone: list[bytes] = []
        gone_here: list[bytes] = []
        for hash_ in event.block_hashes:
            held = self._blocks.get(_number(hash_))
            if held is None or not held.among(medium) & bit:
                continue
            was_here = held.is_whole(medium, self._full)
            held.groups &= ~(bit << (medium * GROUPS_MAX))
            self._note_window(held)
            if held.name and bit & self._full and was_here:
                gone_here.append(held.name)
                if not any(held.is_whole(each, self._full) for each in range(len(MEDIA))):
                    gone.append(held.name)
            if not held.groups:
                del self._blocks[_number(hash_)]
        self._directory.evicted(self.media[medium], keys_of(gone_here))
        self._directory.evicted(self.address, keys_of(gone))
        self._gone.add(keys_of(gone))

    def _named(self, event: KvStored) -> tuple[str, list[bytes]]:
        """The scope and the names of the event's blocks. Blocks that depend on pictures or on an unknown parent have no
        name.
        """
        num_plain = _num_plain(event)
        if len(event.token_ids) != len(event.block_hashes) * event.block_size:
            return "", []
        parent, scope = None, _scope(event)
        if event.parent_block_hash is not None:
            held = self._blocks.get(_number(event.parent_block_hash))
            if held is None or not held.name:
                return "", []
            parent, scope = held.name, held.scope
        tokens = event.token_ids[: num_plain * event.block_size]
        return scope, self._names.continued(parent, tokens, scope, event.block_size)


def _number(hash_: Hash) -> int:
    """The engine's hash of a block, as 64 bits. The shorter hash takes half the memory, and a collision only costs a
    wrong guess.
    """
    return hash_ if isinstance(hash_, int) else hash(hash_)


def _scope(event: KvStored) -> str:
    """The scope (adapter and salt) of the first block of a chain. A later block has its parent's scope."""
    lora, salt = event.lora_name or "", event.cache_salt or ""
    if event.extra_keys and event.extra_keys[0]:
        last = _without_lora(event.extra_keys[0], lora)[-1:]
        salt = last[0] if last and isinstance(last[0], str) else salt
    return scope_of(lora=lora, salt=salt)


def _num_plain(event: KvStored) -> int:
    """The number of leading blocks whose content is tokens alone. Other blocks depend on pictures or embeddings, which
    no prompt here has.
    """
    lora = event.lora_name or ""
    for index, extra in enumerate(event.extra_keys or ()):
        left = _without_lora(extra or [], lora)
        if index == 0 and event.parent_block_hash is None and left and isinstance(left[-1], str):
            left = left[:-1]
        if left:
            return index
    return len(event.block_hashes)


def _without_lora(extra: Iterable[object], lora: str) -> list[object]:
    found = list(extra)
    return found[1:] if lora and found[:1] == [lora] else found
