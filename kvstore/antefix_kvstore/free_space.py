"""How much space the file system under a store has, and how much of it a store leaves to others (ledgers, logs, ...).

    at start        a budget larger than the disk can hold is lowered, and the log says so
    while running   the limit follows the free space; puts are refused before the ledger would run out of space

A store does not evict because somebody else fills the disk suddenly: it stops storing and continues to serve reads.
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

# By default a store leaves this share of its file system free, up to a fixed number of bytes.
_MARGIN_SHARE: Final = 1 / 16
_MARGIN_BYTES_MAX: Final = 256 << 20
# The limit stays above the margin. Puts stop at half of the margin, because deleted segments stay on the disk for a
# second or two while readers have them open.
_STOP_SHARE: Final = 1 / 2
# Below this share of the margin, somebody else is filling the disk quickly; space that evictions free would go to them.
_SUDDEN_SHARE: Final = 1 / 4
# A store with at most this share of its file system is not the cause of a full disk: it stops storing but evicts
# nothing.
_FAIR_SHARE: Final = 1 / 4


class FreeSpace:
    """Free space of the file system that holds `directory`. margin_bytes: bytes to leave free; 0 for the default."""

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
        """Whether other programs have taken most of the margin as well."""
        return self.nbytes < self.margin_bytes * _SUDDEN_SHARE

    def room(self) -> int:
        """Bytes by which the store may grow; negative if the margin is used already."""
        return self.nbytes - self.margin_bytes

    def has_room(self, nbytes: int) -> bool:
        """Whether `nbytes` bytes may be written now."""
        return self.nbytes - nbytes >= self.margin_bytes * _STOP_SHARE


def fit_to_disk(config: KvStoreConfig, *, statvfs: Callable[[Path], os.statvfs_result] = os.statvfs) -> KvStoreConfig:
    """The settings, with the budget lowered to the size for which the file system has room (including the store's
    present files).

    A segment size that is too large for that budget is lowered too.
    """
    directory = Path(config.dir)
    there = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    free = FreeSpace(there, config.free_bytes_min, statvfs=statvfs)
    can_hold = max(BUDGET_BYTES_MIN, _bytes_of(directory) + free.room())
    if can_hold >= config.budget_bytes:
        return config
    log.warning(
        "the file system of %s has room for only %d bytes of the store's budget of %d, with %d bytes left free "
        "for other programs. The"
        " store takes at most %d bytes; set a lower --budget-bytes, or use a larger disk",
        *(config.dir, can_hold, config.budget_bytes, free.margin_bytes, can_hold),
    )
    segment_bytes = config.segment_bytes if config.segment_bytes <= can_hold // 4 else 0
    return dataclasses.replace(config, budget_bytes=can_hold, segment_bytes=segment_bytes)


def _bytes_of(directory: Path) -> int:
    """Bytes that the files in the directory take on disk; an index file may have holes."""
    return sum(path.stat().st_blocks * 512 for path in directory.rglob("*") if path.is_file())
