"""What the file system under a store has left, and how much of that a store leaves to others: bills, logs, neighbours.

    at start        a budget that the disk cannot hold is lowered to what it can, and that is said
    while running   the limit follows what is free; a put that would take the last of it is refused, not the bill

A store never gives up records because somebody else fills the disk suddenly: it stops storing and continues serving.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Final

from antefix_kvstore.kvstore_config import BUDGET_BYTES_MIN, KvStoreConfig

log = logging.getLogger("antefix_kvstore.space")

# By default a store leaves this part of its file system free, and no more than so many bytes.
_MARGIN_SHARE: Final = 1 / 16
_MARGIN_BYTES_MAX: Final = 256 << 20
# The limit keeps clear of the margin. Puts stop in the middle of it: deleted segments stay on the disk for a second or
# two, as long as readers have them open.
_STOP_SHARE: Final = 1 / 2
# Below this part of the margin somebody else fills the disk quickly; giving up records would only feed it.
_SUDDEN_SHARE: Final = 1 / 4
# A store that takes no more than this of its file system is not what fills it: it stops storing, and gives up nothing.
_FAIR_SHARE: Final = 1 / 4


class FreeSpace:
    """Of the file system that `directory` is on. margin_bytes: to be left free; 0 for the default."""

    def __init__(
        self, directory: Path, margin_bytes: int = 0, *, statvfs: Callable[[Path], os.statvfs_result] = os.statvfs
    ) -> None:
        self._directory = directory
        self._statvfs = statvfs
        space = statvfs(directory)
        total_bytes = space.f_blocks * space.f_frsize
        self.margin_bytes = margin_bytes or min(_MARGIN_BYTES_MAX, int(total_bytes * _MARGIN_SHARE))
        self.fair_share_bytes = int(total_bytes * _FAIR_SHARE)

    @property
    def nbytes(self) -> int:
        try:
            space = self._statvfs(self._directory)
        except OSError:
            return 0  # the directory is gone or was replaced under us: nothing can be stored in it
        return space.f_bavail * space.f_frsize

    @property
    def is_sudden(self) -> bool:
        """Somebody else has taken even most of the margin."""
        return self.nbytes < self.margin_bytes * _SUDDEN_SHARE

    def room(self) -> int:
        """What a store may grow by; negative where the margin is touched."""
        return self.nbytes - self.margin_bytes

    def has_room(self, nbytes: int) -> bool:
        """Whether so much may be written now."""
        return self.nbytes - nbytes >= self.margin_bytes * _STOP_SHARE


def fit_to_disk(config: KvStoreConfig, *, statvfs: Callable[[Path], os.statvfs_result] = os.statvfs) -> KvStoreConfig:
    """The settings with a budget that the file system can hold, besides what the store has there already.

    A segment size that is too large for it goes as well.
    """
    directory = Path(config.dir)
    there = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    free = FreeSpace(there, config.free_bytes_min, statvfs=statvfs)
    can_hold = max(BUDGET_BYTES_MIN, _bytes_of(directory) + free.room())
    if can_hold >= config.budget_bytes:
        return config
    log.warning(
        "the file system of %s can hold %d bytes of the store's budget of %d, with %d left free for others: "
        "it takes %d bytes; set --budget-bytes, or give it a larger disk",
        *(config.dir, can_hold, config.budget_bytes, free.margin_bytes, can_hold),
    )
    segment_bytes = config.segment_bytes if config.segment_bytes <= can_hold // 4 else 0
    return dataclasses.replace(config, budget_bytes=can_hold, segment_bytes=segment_bytes)


def _bytes_of(directory: Path) -> int:
    """What the files below it take on the disk; an index's file may have holes."""
    return sum(path.stat().st_blocks * 512 for path in directory.rglob("*") if path.is_file())
