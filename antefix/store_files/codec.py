"""Lossless compression of payloads: split into byte planes, then zstd per plane where that saves enough. Knows bytes.

Rows of KV mix fields whose bytes differ in distribution (FP8 codes, scales, the high and low bytes of BF16), so zstd
cannot compress them well. So payloads are split by field and by byte of an item into byte planes, and each plane is
compressed alone.

Coded payload (format.Codec.PLANES_ZSTD): the plan, then a table of planes, then the planes.
    u16 number of parts; per part: u32 rows, u8 fields; per field: u32 bytes, u8 width
    u8 number of planes; per plane: u8 mode (0 raw, 1 zstd), u32 length
Parts with equal fields share their planes, in the order of the parts.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np
import numpy.typing as npt
import zstandard

from antefix.errors import BlockCorrupt
from antefix.layout import PayloadLayout, PayloadPart
from antefix.record import Buffer

# Level 3 gains nothing over 1 on this data, and negative levels store float data raw.
ZSTD_LEVEL: Final = 1
# If compression saves less than this share, reading the raw plane is faster than decoding it.
PLANE_GAIN_MIN: Final = 0.03
PAYLOAD_GAIN_MIN: Final = 0.05
_PART: Final = struct.Struct("<IB")
_FIELD: Final = struct.Struct("<IB")
_PLANE: Final = struct.Struct("<BI")
_RAW, _ZSTD = 0, 1

Bytes = npt.NDArray[np.uint8]
_local = threading.local()


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanePart:
    """`num_rows` consecutive rows, each made of fields given as (bytes, item width)."""

    num_rows: int
    fields: tuple[tuple[int, int], ...]

    @property
    def row_bytes(self) -> int:
        return sum(nbytes for nbytes, _ in self.fields)


@dataclass(frozen=True, kw_only=True)
class PlanePlan:
    """How a payload is split into planes. This class has no slots, so that derived tables are computed only once."""

    parts: tuple[PlanePart, ...]

    @cached_property
    def payload_bytes(self) -> int:
        return sum(part.num_rows * part.row_bytes for part in self.parts)

    @cached_property
    def groups(self) -> dict[tuple[tuple[int, int], ...], list[tuple[int, int]]]:
        """Maps the fields of a row to (offset, rows) of each part with these fields."""
        groups: dict[tuple[tuple[int, int], ...], list[tuple[int, int]]] = {}
        offset = 0
        for part in self.parts:
            groups.setdefault(part.fields, []).append((offset, part.num_rows))
            offset += part.num_rows * part.row_bytes
        return groups

    @cached_property
    def encoded(self) -> bytes:
        out = [len(self.parts).to_bytes(2, "little")]
        for part in self.parts:
            out.append(_PART.pack(part.num_rows, len(part.fields)))
            out.extend(_FIELD.pack(nbytes, width) for nbytes, width in part.fields)
        return b"".join(out)


def plan_of_block(layout: PayloadLayout) -> PlanePlan:
    """The planes of a block's payload."""
    return _plan(layout.parts)


def plan_of_checkpoint(layout: PayloadLayout) -> PlanePlan:
    """The planes of a checkpoint's payload; a plan without parts where the layout has no checkpoints."""
    return _plan(layout.checkpoint_parts)


def _plan(parts: Sequence[PayloadPart]) -> PlanePlan:
    return PlanePlan(
        parts=tuple(
            PlanePart(num_rows=part.num_rows, fields=tuple((f.nbytes, f.width) for f in part.record.fields))
            for part in parts
        )
    )


def encode(payload: Buffer, plan: PlanePlan, *, level: int = ZSTD_LEVEL) -> bytes | None:
    """The coded payload. Returns None if compression saves too little, or if the plan is for another payload size."""
    data = np.frombuffer(payload, np.uint8)
    if data.nbytes != plan.payload_bytes:
        return None
    table, bodies = [], []
    for views in _plane_views(data, plan):
        plane = np.concatenate([view.reshape(-1) for view in views]) if len(views) > 1 else views[0].reshape(-1).copy()
        packed = _compressor(level).compress(plane.data)
        pays = len(packed) <= plane.nbytes * (1 - PLANE_GAIN_MIN)
        body = packed if pays else plane.tobytes()
        table.append(_PLANE.pack(_ZSTD if pays else _RAW, len(body)))
        bodies.append(body)
    coded = b"".join([plan.encoded, bytes([len(table)]), *table, *bodies])
    return coded if len(coded) <= data.nbytes * (1 - PAYLOAD_GAIN_MIN) else None


def decode(coded: Buffer, into: memoryview) -> None:
    """Fill `into` with the payload.

    Raises:  BlockCorrupt: the coded bytes are invalid, or their payload does not have the size of `into`.
    """
    try:
        plan, at = read_plan(coded)
        out = np.frombuffer(into, np.uint8)
        if plan.payload_bytes != out.nbytes:
            raise BlockCorrupt(
                f"a compressed payload would have {plan.payload_bytes} bytes after decompression; {out.nbytes} were "
                "expected"
            )
        num_planes = coded[at]
        body = at + 1 + num_planes * _PLANE.size
        planes = list(_plane_views(out, plan))
        if len(planes) != num_planes:
            raise BlockCorrupt("the compressed payload has the wrong number of parts")
        for number, views in enumerate(planes):
            mode, length = _PLANE.unpack_from(coded, at + 1 + number * _PLANE.size)
            _fill(views, memoryview(coded)[body : body + length], mode)
            body += length
    except (struct.error, ValueError, IndexError, zstandard.ZstdError) as err:
        raise BlockCorrupt(f"a compressed payload cannot be decompressed: {err}") from err


def _fill(views: Sequence[Bytes], body: memoryview, mode: int) -> None:
    nbytes = sum(view.size for view in views)
    # The library allocates whatever size a frame claims before it decodes the frame, so check the size first.
    if mode == _ZSTD and zstandard.frame_content_size(body) not in (nbytes, -1):
        raise BlockCorrupt(f"a compressed part of a payload claims to decompress to another size than {nbytes} bytes")
    raw = _decompressor().decompress(body, max_output_size=nbytes) if mode == _ZSTD else body
    plane = np.frombuffer(raw, np.uint8)
    if plane.nbytes != nbytes:
        raise BlockCorrupt(
            f"a compressed part of a payload has {plane.nbytes} bytes after decompression; {nbytes} were expected"
        )
    start = 0
    for view in views:
        view[...] = plane[start : start + view.size].reshape(view.shape)
        start += view.size


def _plane_views(data: Bytes, plan: PlanePlan) -> Iterator[list[Bytes]]:
    """For each plane, the strided views of the plane's bytes in each part."""
    for fields, places in plan.groups.items():
        row_bytes = sum(nbytes for nbytes, _ in fields)
        rows = [data[offset : offset + n * row_bytes].reshape(n, row_bytes) for offset, n in places]
        start = 0
        for nbytes, width in fields:
            for byte in range(width):
                yield [row[:, start + byte : start + nbytes : width] for row in rows]
            start += nbytes


def read_plan(coded: Buffer) -> tuple[PlanePlan, int]:
    """The plan at the start of `coded`, and the offset of its end.

    Raises:  struct.error: there is no plan.
    """
    # Consecutive payloads mostly have the same plan, so keep the last one: parsing took a quarter of decoding.
    last: PlanePlan | None = _local.__dict__.get("last_plan")
    if last is not None and memoryview(coded)[: len(last.encoded)] == last.encoded:
        return last, len(last.encoded)
    at = 2
    parts = []
    for _ in range(int.from_bytes(coded[:2], "little")):
        num_rows, num_fields = _PART.unpack_from(coded, at)
        at += _PART.size
        fields = tuple(_FIELD.unpack_from(coded, at + i * _FIELD.size) for i in range(num_fields))
        at += num_fields * _FIELD.size
        parts.append(PlanePart(num_rows=num_rows, fields=fields))
    _local.last_plan = _interned(tuple(parts))
    return _local.last_plan, at


def _interned(parts: tuple[PlanePart, ...]) -> PlanePlan:
    """One plan object is kept per thread and layout. Deriving a plan's tables costs more than decoding a small
    payload.
    """
    plans: dict[tuple[PlanePart, ...], PlanePlan] = _local.__dict__.setdefault("plans", {})
    if parts not in plans and len(plans) >= 64:
        plans.clear()
    return plans.setdefault(parts, PlanePlan(parts=parts))


def _compressor(level: int) -> zstandard.ZstdCompressor:
    """A compressor for this thread: one zstd context must not be used by two threads at once."""
    contexts: dict[int, zstandard.ZstdCompressor] = _local.__dict__.setdefault("compressors", {})
    if level not in contexts:
        contexts[level] = zstandard.ZstdCompressor(level=level)
    return contexts[level]


def _decompressor() -> zstandard.ZstdDecompressor:
    if "decompressor" not in _local.__dict__:
        _local.decompressor = zstandard.ZstdDecompressor()
    context: zstandard.ZstdDecompressor = _local.decompressor
    return context
