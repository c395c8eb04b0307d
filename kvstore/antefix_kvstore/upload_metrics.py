"""Metrics of a store service's uploads to the object tier."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from prometheus_client.core import Metric

from antefix.objects.object_metrics import catalog_metrics
from antefix.telemetry.shown import Shown, Table, families, gauge
from antefix_kvstore.object_upload import ObjectUploader

_DELETED = "antefix_object_deleted_segments"
_DELETED_HELP = "Segments that this service deleted, by reason: expired, budget or quota."

# Fields of `object_upload.UploadCounters`.
UPLOADS: Final[Table] = {
    "num_uploaded": Shown(
        name="antefix_object_uploaded_records", help="Records that were uploaded to the object store."
    ),
    "bytes_uploaded": Shown(
        name="antefix_object_uploaded_payload_bytes",
        help="Uncompressed bytes of the records that were uploaded to the object store.",
    ),
    "num_left": Shown(
        name="antefix_object_left_records",
        help=(
            "Records not uploaded because they could not be read, or because their tenant has no key for the "
            "object store."
        ),
    ),
    "num_forgotten": Shown(
        name="antefix_object_forgotten_names",
        help="Records dropped from the upload queue because they waited too long.",
    ),
    "num_failures": Shown(
        name="antefix_object_failures",
        help="Failed uploads and failed maintenance passes over the object store; they are tried again.",
    ),
    "num_passes": Shown(
        name="antefix_object_passes",
        help=(
            "Maintenance passes over the object store, which enforce its size limit and times to live and update "
            "its index."
        ),
    ),
}
# Fields of `object_writer.ObjectWriteCounters`.
WRITES: Final[Table] = {
    "num_records": Shown(name="antefix_object_written_records", help="Records in the objects that were written."),
    "num_segments": Shown(name="antefix_object_written_segments", help="Segments that were written."),
    "bytes_written": Shown(name="antefix_object_written_bytes", help="Bytes of the segment objects that were written."),
}
# Fields of `janitor.JanitorCounters`.
JANITOR: Final[Table] = {
    "num_expired": Shown(name=_DELETED, help=_DELETED_HELP, labels=(("cause", "expired"),)),
    "num_over_budget": Shown(name=_DELETED, help=_DELETED_HELP, labels=(("cause", "budget"),)),
    "num_over_quota": Shown(name=_DELETED, help=_DELETED_HELP, labels=(("cause", "quota"),)),
    "num_drafts": Shown(name="antefix_object_deleted_drafts", help="Half-finished uploads that were deleted."),
    "num_tiles": Shown(
        name="antefix_object_written_tiles", help="Parts (tiles) of the object store's index that were written."
    ),
}


def upload_metrics(uploader: ObjectUploader) -> Iterable[Metric]:
    """Metrics that any thread may read."""
    yield from families(UPLOADS, uploader.counters)
    yield from families(WRITES, uploader.writer.counters)
    yield from families(JANITOR, uploader.janitor.counters)
    yield gauge("antefix_object_waiting_names", "Records that wait to be uploaded.", {(): uploader.num_waiting})
    yield gauge(
        "antefix_object_tier_bytes",
        "Bytes that the object tier takes, as far as this service knows.",
        {(): sum(uploader.catalog.bytes_by_tenant().values())},
    )
    yield from catalog_metrics(uploader.catalog)
