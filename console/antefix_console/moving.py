"""The parts that commands share that move records: a copy with a progress line, grants for stores, the report."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from antefix.security.own_credentials import credentials_for
from antefix_console.progress_line import ProgressLine
from antefix_kvstore.copy_store import CopyLimits, CopyReport, CopySource, CopyTarget, copy_store

_GRANT_S = 300.0


def grant_of_owner(address: str, owner: bytes) -> bytes:
    """The grant that a store requires for calls about this owner; empty if this process cannot sign one, or none is
    required.
    """
    shown = credentials_for(address)
    return b"" if shown is None else shown.grant_for_owners([owner], ttl_s=_GRANT_S)


async def copy_between(
    contents: CopySource,
    targets: Sequence[CopyTarget],
    *,
    bytes_per_s: int = 0,
    bytes_max: int | None = None,
) -> CopyReport:
    """Copy, and close the targets.  Raises:  AntefixError: a target of the copy does not answer."""
    try:
        with ProgressLine("copying") as progress:
            return await copy_store(
                contents,
                targets,
                CopyLimits(bytes_per_s=bytes_per_s, bytes_max=bytes_max),
                grant_for=lambda owner: grant_of_owner("", owner),
                progress=progress.count,
            )
    finally:
        await asyncio.gather(*(target.close() for target in targets))


def report_text(report: CopyReport) -> str:
    lines = [
        f"{report.num_copied} records copied, {report.bytes_copied:,} bytes; {report.num_there} were there already",
    ]
    if report.num_left:
        lines.append(f"{report.num_left} records left: they are over --bytes-max")
    if report.num_missing:
        lines.append(f"{report.num_missing} records are NOT there; run it again, or see `antefix fsck`")
    lines += [f"  {number} refused: {text}" for text, number in report.refusals.items()]
    return "\n".join(lines)
