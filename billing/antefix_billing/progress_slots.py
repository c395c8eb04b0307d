"""The progress file: how much each running request has used so far, so that a crash does not lose its bill.

The file lies next to the ledger and has one 256-byte slot per running request. The slot is overwritten before each
piece of output is handed out, and freed when the request is settled. A write is one `pwrite` within one page, without a
sync, and takes some microseconds. The written progress survives the end of the process, however it ends. The whole
file is synced once a second, so a power cut costs the operator at most the last second's output. When the router
starts after a crash, it closes each open request in the ledger with the counts of its slot.

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
    148     4     crc-32 of bytes 8 to 148; where it does not match, as in older slots without this field, bytes 144 to
    148 count as 0
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
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

log = logging.getLogger("antefix_billing")

SLOT_BYTES: Final = 256
PROGRESS_FILE: Final = "progress"
_MAGIC: Final = b"AFPG"
_HEAD: Final = struct.Struct("<4sI")
# The kinds of evidence by number. Slots written before this field existed have 0.
_EVIDENCE: Final = (Evidence.PROVED, Evidence.REPORTED, Evidence.EXPECTED, Evidence.UNKNOWN)
_BODY: Final = struct.Struct("<16s8IQ24s24s32s")
_MORE: Final = struct.Struct("<II")
_GROW_SLOTS: Final = 64
_RESERVE_SLOTS: Final = 1024
# Far more slots than a router runs requests. A file with more was not written by this program.
_SLOTS_MAX: Final = 1 << 16


class ProgressJournal:
    """The progress file of one ledger. All calls come from one thread, except `sync`."""

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
        """How much a request had used when the previous process ended."""
        return self._found.get(_name(event_id))

    def clear(self) -> None:
        """Empty the progress file, because the requests found in it have been settled in the ledger."""
        self._found.clear()
        os.ftruncate(self._fd, 0)
        self._slots, self._free, self._num_slots = {}, [], 0
        self._hold()

    def mark(self, event_id: str, done: Usage) -> None:
        """Record how much a request has used so far. When this returns, the progress survives the end of this process.

        Raises:  Unavailable: it could not be written.
        """
        try:
            number = self._slots.get(event_id)
            if number is None:
                number = self._slots[event_id] = self._take()
            os.pwrite(self._fd, _pack(event_id, done), number * SLOT_BYTES)
        except OSError as err:
            log.exception("the ledger's progress file cannot be written")
            raise Unavailable("the ledger's progress file cannot be written; the router's log says why") from err

    def drop(self, event_id: str) -> None:
        """Free the slot of a settled request. If a crash leaves the slot behind, it names a settled request and is
        ignored.
        """
        number = self._slots.pop(event_id, None)
        if number is not None:
            self._free.append(number)

    def sync(self) -> None:
        """Sync the file to disk.  Raises:  OSError."""
        os.fdatasync(self._fd)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1

    def _hold(self) -> None:
        """Allocate room in the file for a busy router's requests now. If the disk is full already, this allocates
        nothing.
        """
        with contextlib.suppress(OSError):
            allocate(self._fd, 0, _RESERVE_SLOTS * SLOT_BYTES)

    def _take(self) -> int:
        if not self._free:
            first, self._num_slots = self._num_slots, self._num_slots + _GROW_SLOTS
            # Allocate disk blocks now, because a write into a hole could later find the disk full.
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
    """(name, counts), or None for a slot that was never used or was left incomplete by a power cut."""
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
        return None  # no version of this program writes such texts


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
