"""How far the requests that are running have got, so that a crash does not leave them without a bill.

A file of 256-byte slots next to the ledger, one for each running request, written over before each piece of output is
handed out and freed when the request is settled. A write is a `pwrite` within one page and without a sync, some
microseconds: it outlives the process, whatever ends it. Once a second all of it is synced, so a power cut costs us at
most that second's output. What a slot says goes into the ledger when the next start closes the request.

    offset  size  slot
    0       4     magic "AFPG"
    4       4     crc-32 of bytes 8 to 144
    8       16    hash of the event id
    24      32    u32: prompt, hit, hit in memory, written, output, reasoning, replayed tokens, evidence
    56      8     time to the first token, microseconds
    64      24    restore plan, padded with zeros
    88      24    miss reason, padded with zeros
    112     32    hash of the last block that was hit; zeros without a hit
    144     4     written tokens that are to be kept for an hour or longer
    148     4     crc-32 of bytes 8 to 148; where it does not hold, as in slots of before there was one, these are 0
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import struct
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from antefix.errors import Unavailable
from antefix.miss_reason import MissReason
from antefix.own_files import put_aside
from antefix.usage import Evidence, Usage
from antefix_billing.ledger_reserve import allocate

SLOT_BYTES: Final = 256
PROGRESS_FILE: Final = "progress"
_MAGIC: Final = b"AFPG"
_HEAD: Final = struct.Struct("<4sI")
# By number; 0 is what slots had before there was a choice.
_EVIDENCE: Final = (Evidence.PROVED, Evidence.REPORTED, Evidence.EXPECTED, Evidence.UNKNOWN)
_BODY: Final = struct.Struct("<16s8IQ24s24s32s")
_MORE: Final = struct.Struct("<II")
_GROW_SLOTS: Final = 64
_RESERVE_SLOTS: Final = 1024
# Far more than a router runs at once; a file that says so was not written by us.
_SLOTS_MAX: Final = 1 << 16


class ProgressJournal:
    """The file of one ledger. Called from one thread, but for `sync`."""

    def __init__(self, directory: Path) -> None:
        put_aside(directory / PROGRESS_FILE)
        self._fd = os.open(directory / PROGRESS_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._slots: dict[str, int] = {}
        self._free: list[int] = []
        self._found: dict[bytes, Usage] = {}
        self._num_slots = min(_SLOTS_MAX, os.fstat(self._fd).st_size // SLOT_BYTES)
        self._hold()
        for number in range(self._num_slots):
            found = _unpack(os.pread(self._fd, SLOT_BYTES, number * SLOT_BYTES))
            if found is not None:
                self._found[found[0]] = found[1]

    def found(self, event_id: str) -> Usage | None:
        """How far a request had got when the process before us ended."""
        return self._found.get(_name(event_id))

    def clear(self) -> None:
        """What was found has been put into the ledger."""
        self._found.clear()
        os.ftruncate(self._fd, 0)
        self._slots, self._free, self._num_slots = {}, [], 0
        self._hold()

    def mark(self, event_id: str, done: Usage) -> None:
        """Note how far a request is; outlives this process when this returns.

        Raises:  Unavailable: it could not be written.
        """
        try:
            number = self._slots.get(event_id)
            if number is None:
                number = self._slots[event_id] = self._take()
            os.pwrite(self._fd, _pack(event_id, done), number * SLOT_BYTES)
        except OSError as err:
            raise Unavailable(f"the ledger's progress file cannot be written: {err}") from err

    def drop(self, event_id: str) -> None:
        """The request is settled. A slot that a crash leaves behind names a settled request and is not looked at."""
        number = self._slots.pop(event_id, None)
        if number is not None:
            self._free.append(number)

    def sync(self) -> None:
        """On disk when this returns. Raises:  OSError."""
        os.fdatasync(self._fd)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1

    def _hold(self) -> None:
        """Have room for a busy router's requests before the disk may be full; there is none to be had where it is."""
        with contextlib.suppress(OSError):
            allocate(self._fd, 0, _RESERVE_SLOTS * SLOT_BYTES)

    def _take(self) -> int:
        if not self._free:
            first, self._num_slots = self._num_slots, self._num_slots + _GROW_SLOTS
            # Allocated now: a write into a hole could find the disk full later.
            os.posix_fallocate(self._fd, first * SLOT_BYTES, _GROW_SLOTS * SLOT_BYTES)
            self._free = list(range(self._num_slots - 1, first - 1, -1))
        return self._free.pop()


def _pack(event_id: str, done: Usage) -> bytes:
    body = _BODY.pack(
        _name(event_id),
        done.prompt_tokens,
        done.cache_hit_tokens,
        done.hit_memory_tokens,
        done.cache_write_tokens,
        done.output_tokens,
        done.reasoning_tokens,
        done.replayed_tokens,
        _EVIDENCE.index(done.evidence),
        done.ttft_us,
        done.restore_plan.encode(),
        done.miss_reason.value.encode(),
        bytes.fromhex(done.last_hit_hash),
    )
    crc = zlib.crc32(body)
    kept = done.cache_write_1h_tokens
    return _HEAD.pack(_MAGIC, crc) + body + _MORE.pack(kept, zlib.crc32(kept.to_bytes(4, "little"), crc))


def _unpack(data: bytes) -> tuple[bytes, Usage] | None:
    """(name, work), or None where a slot was never used, or torn by a power cut."""
    if len(data) < _HEAD.size + _BODY.size + _MORE.size:
        return None
    magic, crc = _HEAD.unpack_from(data)
    if magic != _MAGIC or zlib.crc32(data[_HEAD.size : _HEAD.size + _BODY.size]) != crc:
        return None
    fields = _BODY.unpack_from(data, _HEAD.size)
    kept, crc_with_it = _MORE.unpack_from(data, _HEAD.size + _BODY.size)
    if zlib.crc32(kept.to_bytes(4, "little"), crc) != crc_with_it:
        kept = 0
    try:
        return fields[0], replace(_usage_of(fields), cache_write_1h_tokens=kept)
    except ValueError:
        return None  # texts that no version has written


def _usage_of(fields: tuple[Any, ...]) -> Usage:
    _, prompt, hit, memory, written, output, reasoning, replayed, word, ttft_us, plan, reason, last = fields
    evidence = _EVIDENCE[word] if word < len(_EVIDENCE) else Evidence.UNKNOWN
    return Usage(
        prompt_tokens=prompt,
        cache_hit_tokens=hit,
        hit_memory_tokens=memory,
        cache_write_tokens=written,
        output_tokens=output,
        reasoning_tokens=reasoning,
        replayed_tokens=replayed,
        ttft_us=ttft_us,
        restore_plan=plan.rstrip(b"\0").decode(),
        miss_reason=MissReason(reason.rstrip(b"\0").decode()),
        last_hit_hash=last.hex() if hit and evidence is Evidence.PROVED else "",
        evidence=evidence,
    )


def _name(event_id: str) -> bytes:
    return hashlib.blake2b(event_id.encode(), digest_size=16, person=b"antefix-progress").digest()
