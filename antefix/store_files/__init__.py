"""A store's files as any process on its host may read them: record format, index, segments, and the log of hits.

The store's own process writes them (kvstore/); docs/FORMAT.md is the contract. Nothing here needs the service.
"""
