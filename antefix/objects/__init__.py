"""The object tier: segments in an S3-compatible object store or a shared directory, found and read by any host.

docs/OBJECT_STORE.md has the layout and why it is so. `bucket` is where bytes lie, `segment_object` what they mean,
`object_index` where each record is, `catalog` keeps that fresh, `object_tier` reads, `object_writer` writes.
"""
