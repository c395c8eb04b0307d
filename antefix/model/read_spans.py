"""Fills tensors from files. Each file is read from front to back in spans; while one span is read, the previous span is
copied.

Spans lie in two buffers, which are pinned where tensors are on a GPU; no other part of a file is ever in memory.
If the model has another dtype than the file, numbers are converted while they are copied.

Span:  up to SPAN_BYTES of a file, cut between numbers; holds pieces of one tensor or of several.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter
from pathlib import Path

import torch
from torch import Tensor

from antefix.errors import ModelError
from antefix.model.checkpoint import StoredTensor
from antefix.model.load_plan import Copy

# Long enough for the full rate of a disk and of a GPU. A load takes two spans of host memory and no more.
SPAN_BYTES = 64 << 20
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "I64": torch.int64,
    "I32": torch.int32, "F8_E4M3": torch.float8_e4m3fn, "F8_E8M0": torch.float8_e8m0fnu, "I8": torch.uint8,
    "U8": torch.uint8, "F4": torch.uint8,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Piece:
    """Bytes [start, stop) of a stored tensor, and where they go."""

    copy: Copy
    start: int
    stop: int

    @property
    def offset(self) -> int:
        return self.copy.source.offset + self.start


@dataclass(frozen=True, slots=True)
class _Span:
    file: Path
    offset: int
    nbytes: int
    pieces: tuple[_Piece, ...]


def fill(state: dict[str, Tensor], copies: Sequence[Copy], progress: Callable[[int, int], None]) -> None:
    """Read everything that `copies` names from files into the tensors of `state`.

    Raises:  ModelError: a file cannot be read, or is shorter than its header says.
    """
    spans = list(_spans(copies))
    total = sum(span.nbytes for span in spans)
    on_card = any(tensor.device.type == "cuda" for tensor in state.values())
    size = max((span.nbytes for span in spans), default=0)
    buffers = [torch.empty(size, dtype=torch.uint8, pin_memory=on_card) for _ in range(2)]
    done = 0
    with ThreadPoolExecutor(1, thread_name_prefix="read-weights") as reader:
        coming = reader.submit(_read, spans[0], buffers[0]) if spans else None
        for number, span in enumerate(spans):
            if coming is not None:
                coming.result()
            if number + 1 < len(spans):
                coming = reader.submit(_read, spans[number + 1], buffers[(number + 1) % 2])
            _scatter(span, buffers[number % 2], state)
            done += span.nbytes
            progress(done, total)


def _spans(copies: Sequence[Copy]) -> Iterator[_Span]:
    ordered = sorted(copies, key=lambda copy: (copy.source.file, copy.source.offset))
    for file, of_file in groupby(ordered, key=attrgetter("source.file")):
        held: list[_Piece] = []
        for piece in (piece for copy in of_file for piece in _cut(copy)):
            # Bytes between the wanted tensors are not read.
            if held and (piece.offset != _end(held) or _end(held) - held[0].offset + _size(piece) > SPAN_BYTES):
                yield _span(file, held)
                held = []
            held.append(piece)
        if held:
            yield _span(file, held)


def _cut(copy: Copy) -> Iterator[_Piece]:
    # SPAN_BYTES is a multiple of every number's size.
    for start in range(0, copy.source.nbytes, SPAN_BYTES):
        yield _Piece(copy, start, min(start + SPAN_BYTES, copy.source.nbytes))


def _size(piece: _Piece) -> int:
    return piece.stop - piece.start


def _end(pieces: list[_Piece]) -> int:
    return pieces[-1].offset + _size(pieces[-1])


def _span(file: Path, pieces: list[_Piece]) -> _Span:
    return _Span(file, pieces[0].offset, _end(pieces) - pieces[0].offset, tuple(pieces))


def _read(span: _Span, buffer: Tensor) -> None:
    target = buffer.numpy().data[: span.nbytes]
    try:
        descriptor = os.open(span.file, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, span.offset, span.nbytes, os.POSIX_FADV_SEQUENTIAL)
            num_read = 0
            while num_read < span.nbytes:
                count = os.preadv(descriptor, [target[num_read:]], span.offset + num_read)
                if not count:
                    raise ModelError(f"cannot read {span.file}: the file ends at byte {span.offset + num_read}")
                num_read += count
        finally:
            os.close(descriptor)
    except OSError as err:
        raise ModelError(f"cannot read {span.file}: {err}") from err


def _scatter(span: _Span, buffer: Tensor, state: dict[str, Tensor]) -> None:
    touched: set[torch.device] = set()
    for piece in span.pieces:
        offset = piece.offset - span.offset
        values = _as_numbers(buffer[offset : offset + _size(piece)], piece.copy.source)
        target = state[piece.copy.target].view(-1)
        first = piece.copy.first + piece.start // values.element_size()
        target[first : first + len(values)].copy_(values, non_blocking=True)
        touched.add(target.device)
    # Wait for the copies, because the buffer is overwritten next.
    for device in touched:
        if device.type == "cuda":
            torch.cuda.synchronize(device)


def _as_numbers(raw: Tensor, source: StoredTensor) -> Tensor:
    dtype = _DTYPES[source.dtype]
    # The format does not promise that a tensor starts at a multiple of its number's size.
    return (raw if raw.storage_offset() % dtype.itemsize == 0 else raw.clone()).view(dtype)
