"""Metrics of a reader of the object tier: the names under which the tier's counters are shown."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from prometheus_client.core import Metric

from antefix.objects.catalog import Catalog
from antefix.objects.object_tier import ObjectTier
from antefix.telemetry.shown import Shown, Table, families, gauge

# `object_reads.ObjectReadCounters`.
READS: Final[Table] = {
    "num_blocks": Shown(name="antefix_object_read_blocks", help="Blocks that were read from the object store."),
    "num_ranges": Shown(name="antefix_object_ranges", help="Read calls that asked an object for a range of its bytes."),
    "num_direct_ranges": Shown(
        name="antefix_object_direct_ranges",
        help="Range reads of objects whose bytes went straight into the buffers of their records.",
    ),
    "num_broken_ranges": Shown(
        name="antefix_object_broken_ranges",
        help="Direct range reads of objects that broke off; the rest of each was read through the library.",
    ),
    "num_asked_again": Shown(
        name="antefix_object_asked_again_ranges",
        help="Requests for ranges of objects that were sent a second time, because no answer began.",
    ),
    "bytes_read": Shown(
        name="antefix_object_read_bytes",
        help="Bytes that range reads of objects returned, including gaps between records and headers of records.",
    ),
    "num_gone": Shown(
        name="antefix_object_gone_segments", help="Objects that were deleted while a read of them was running."
    ),
    "num_read_again": Shown(
        name="antefix_object_read_again_records",
        help="Records that failed a check after the first read and were read a second time.",
    ),
    "num_bad": Shown(
        name="antefix_object_bad_records",
        help="Records that failed a check after both reads; each became a cache miss.",
    ),
}


def object_metrics(tier: ObjectTier) -> Iterable[Metric]:
    """Metrics of the tier's reads. These metrics must be read on the tier's event loop."""
    yield from families(READS, tier.counters)
    yield from catalog_metrics(tier.catalog)


def catalog_metrics(catalog: Catalog) -> Iterable[Metric]:
    """Metrics of this process's index of the object store."""
    yield gauge(
        "antefix_object_known_records", "Records of the object tier that this process knows.", {(): catalog.num_records}
    )
    yield gauge(
        "antefix_object_index_bytes", "Memory of the object tier's index in this process.", {(): catalog.nbytes}
    )
    yield gauge(
        "antefix_object_unreadable_segments",
        "Segments without a sound footer (`antefix fsck --repair`).",
        {(): catalog.num_unreadable},
    )
