"""The object tier: segments in an S3-compatible object store or a shared directory, found and read by any host.

docs/OBJECT_STORE.md explains the layout. `bucket` stores bytes, `segment_object` defines their format, `object_index`
finds records, `catalog` keeps the index up to date, `object_tier` reads, `object_writer` writes.
"""
