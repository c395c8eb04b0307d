"""Tiles: the periods that index objects cover, and which tiles a reader loads. No I/O."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

INDEX: Final = "index/"
# A tile of level 0; each next level has this many of the one below.
TILE_MS: Final = 600_000
FANOUT: Final = 8
LEVEL_MAX: Final = 6
# Between the end of a tile's time and its writing: a segment is named when its upload begins, by its host's clock.
GRACE_MS: Final = 600_000
_NAME: Final = re.compile(r"index/([0-6])-([0-9a-f]{10})\.idx")


@dataclass(frozen=True, slots=True, order=True)
class Tile:
    """The segments that were created in the time [start_ms, stop_ms)."""

    level: int
    number: int

    @property
    def width_ms(self) -> int:
        return TILE_MS * int(FANOUT**self.level)

    @property
    def start_ms(self) -> int:
        return self.number * self.width_ms

    @property
    def stop_ms(self) -> int:
        return self.start_ms + self.width_ms

    @property
    def name(self) -> str:
        return f"{INDEX}{self.level}-{self.number:010x}.idx"

    @property
    def above(self) -> Tile:
        """The tile of the next higher level that covers this tile."""
        return Tile(self.level + 1, self.number // FANOUT)

    def covers(self, created_ms: int) -> bool:
        return self.start_ms <= created_ms < self.stop_ms

    def due(self, now_ms: int) -> bool:
        """Whether the tile may be written, because no further segment can belong to its period."""
        return self.stop_ms + GRACE_MS <= now_ms

    @classmethod
    def at(cls, created_ms: int, level: int = 0) -> Tile:
        return cls(level, created_ms // (TILE_MS * int(FANOUT**level)))

    @classmethod
    def of_name(cls, name: str) -> Tile | None:
        match = _NAME.fullmatch(name)
        return None if match is None else cls(int(match.group(1)), int(match.group(2), 16))


def largest(tiles: Iterable[Tile]) -> list[Tile]:
    """The tiles that no larger tile covers, in order of time."""
    there = set(tiles)
    return sorted((tile for tile in there if not _is_covered(tile, there)), key=lambda tile: tile.start_ms)


def _is_covered(tile: Tile, by: set[Tile]) -> bool:
    while tile.level < LEVEL_MAX:
        tile = tile.above
        if tile in by:
            return True
    return False


def gaps(tiles: Sequence[Tile]) -> list[tuple[int, int | None]]:
    """Periods of time that no tile covers; the last one has no end. tiles: as returned by `largest`."""
    found: list[tuple[int, int | None]] = []
    at = 0
    for tile in tiles:
        if tile.start_ms > at:
            found.append((at, tile.start_ms))
        at = tile.stop_ms
    return [*found, (at, None)]
