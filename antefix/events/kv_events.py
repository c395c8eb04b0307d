"""Encodes and decodes the KV events of vLLM and SGLang, which report an engine's cached blocks by token ids.

A message has three frames: a topic, a number (8 bytes, big-endian, from 0 in each life of the engine), a payload. The
payload is msgpack, an array: [seconds, [event, ...], data-parallel rank or nil]. An event is a map whose `type` is the
name of its class:

    BlockStored      block_hashes, parent_block_hash, token_ids, block_size, lora_id, medium, lora_name, extra_keys,
                     cache_salt (SGLang), group_idx, kv_cache_spec_kind, kv_cache_spec_sliding_window, locality
    BlockRemoved     block_hashes, medium, group_idx, locality
    AllBlocksCleared

Block hashes in KV events are the engine's own, as bytes or integers. Older vLLM sends an event as an array whose first
item is the class name. Fields and events that are not listed here are ignored. Source: vllm/distributed/kv_events.py of
vLLM 0.32, and srt/disaggregation/kv_events.py of SGLang 0.5.23.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from antefix.errors import InvalidRequest

# A message with more events is malformed: one step of an engine stores a few thousand blocks at most.
EVENTS_MAX: Final = 65_536
HASHES_MAX: Final = 1 << 20
# The most cache groups (groups of layers) of a model; DeepSeek-V4 has five.
GROUPS_MAX: Final = 64
# The number after the last one of a replay.
REPLAY_END: Final = (-1).to_bytes(8, "big", signed=True)

GPU, CPU, STORAGE = "GPU", "CPU", "STORAGE"
# Storage media, nearest first, in the engines' own names. Any other medium is farther than these.
MEDIA: Final = (GPU, CPU, STORAGE)
_MEDIUM_OF: Final = {"GPU": GPU, "CPU": CPU, "CPU_PINNED": CPU, "DISK": STORAGE, "STORAGE": STORAGE}

Hash = bytes | int


class KvStored(msgspec.Struct, tag="BlockStored", omit_defaults=True, kw_only=True):
    """Blocks that were stored, in order. token_ids holds their tokens, block after block, following the parent block.

    If an engine skips blocks of a sliding window, there are tokens of more blocks than hashes.
    """

    block_hashes: list[Hash]
    parent_block_hash: Hash | None
    token_ids: list[int]
    block_size: int
    # No default, so that the field is always written: vLLM's decoder requires it.
    lora_id: int | None
    medium: str | None
    lora_name: str | None
    extra_keys: list[list[Any] | None] | None = None
    group_idx: int | None = None
    kv_cache_spec_kind: str | None = None
    kv_cache_spec_sliding_window: int | None = None
    locality: str | None = None
    cache_salt: str | None = None


class KvRemoved(msgspec.Struct, tag="BlockRemoved", omit_defaults=True, kw_only=True):
    """Blocks that were removed."""

    block_hashes: list[Hash]
    medium: str | None
    group_idx: int | None = None
    locality: str | None = None


class KvCleared(msgspec.Struct, tag="AllBlocksCleared"):
    """All blocks were removed."""


KvEvent = KvStored | KvRemoved | KvCleared


@dataclass(frozen=True, slots=True, kw_only=True)
class KvBatch:
    """One message of KV events. num_unread: how many of its events this version of Antefix cannot use."""

    events: tuple[KvEvent, ...]
    ts: float = 0.0
    rank: int | None = None
    num_unread: int = 0


class _StoredIn(KvStored, tag="BlockStored", kw_only=True):
    """The form used for decoding: SGLang and older versions of vLLM omit fields that have no value."""

    lora_id: int | None = None
    medium: str | None = None
    lora_name: str | None = None


class _RemovedIn(KvRemoved, tag="BlockRemoved", kw_only=True):
    medium: str | None = None


class _Outer(msgspec.Struct, array_like=True):
    ts: float
    events: list[msgspec.Raw]
    rank: int | None = None


_TYPES: Final[dict[str, Any]] = {"BlockStored": _StoredIn, "BlockRemoved": _RemovedIn, "AllBlocksCleared": KvCleared}
# The order of the fields in older vLLM's arrays.
_ARRAYS: Final = {
    "BlockStored": (
        *("block_hashes", "parent_block_hash", "token_ids", "block_size"),
        *("lora_id", "medium", "lora_name", "extra_keys"),
    ),
    "BlockRemoved": ("block_hashes", "medium"),
    "AllBlocksCleared": (),
}
# For text that is not UTF-8, msgspec raises Python's UnicodeDecodeError.
_UNREADABLE: Final = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
_ENCODER: Final = msgspec.msgpack.Encoder()
_OUTER: Final = msgspec.msgpack.Decoder(_Outer)
_EVENT: Final = msgspec.msgpack.Decoder(_StoredIn | _RemovedIn | KvCleared)
_PLAIN: Final = msgspec.msgpack.Decoder()


def encode_batch(events: Sequence[KvEvent], *, ts: float, rank: int = 0) -> bytes:
    """The payload of one message."""
    return _ENCODER.encode((ts, events, rank))


def decode_batch(payload: bytes) -> KvBatch:
    """Decode one message's payload.

    Raises:  InvalidRequest: it is not a batch of events, or has more than EVENTS_MAX.
    """
    try:
        outer = _OUTER.decode(payload)
    except _UNREADABLE as err:
        raise InvalidRequest(f"not a batch of KV events: {err}") from err
    if len(outer.events) > EVENTS_MAX:
        raise InvalidRequest(f"a batch of KV events has {len(outer.events)} events; at most {EVENTS_MAX} are allowed")
    found = [_event_of(raw) for raw in outer.events]
    events = tuple(event for event in found if event is not None)
    return KvBatch(events=events, ts=outer.ts, rank=outer.rank, num_unread=len(found) - len(events))


def _event_of(raw: msgspec.Raw) -> KvEvent | None:
    """Returns None if the kind of the event is unknown, or if its contents cannot be used here (for example pairs of
    tokens).
    """
    try:
        event: KvEvent = _EVENT.decode(raw)
    except msgspec.ValidationError:
        return _array_of(raw)
    except _UNREADABLE:
        return None
    return event if _is_sound(event) else None


def _array_of(raw: msgspec.Raw) -> KvEvent | None:
    try:
        value = _PLAIN.decode(raw)
        if not isinstance(value, list) or not value or value[0] not in _ARRAYS:
            return None
        fields = dict(zip(_ARRAYS[value[0]], value[1:], strict=False))
        event: KvEvent = msgspec.convert(fields | {"type": value[0]}, _TYPES[value[0]])
    except (*_UNREADABLE, TypeError):
        return None
    return event if _is_sound(event) else None


def _is_sound(event: KvEvent) -> bool:
    if isinstance(event, KvCleared):
        return True
    if len(event.block_hashes) > HASHES_MAX or not 0 <= (event.group_idx or 0) < GROUPS_MAX:
        return False
    if isinstance(event, KvRemoved):
        return True
    tokens, size = event.token_ids, event.block_size
    if size < 1 or len(tokens) < len(event.block_hashes) * size:
        return False
    return not tokens or (min(tokens) >= 0 and max(tokens) < 1 << 32)


def medium_of(event: KvStored | KvRemoved) -> str:
    """The kind of memory that an event is about, one of MEDIA. Engines that have only their own memory as a medium send
    None as the medium.
    """
    return GPU if event.medium is None else _MEDIUM_OF.get(event.medium, STORAGE)
