"""Antefix as a disk tier of vLLM: `AntefixTier`, which vLLM loads by its configuration (docs/ENGINES.md).

vLLM copies finished blocks of its KV cache into *rows* of host memory, one row per block of one cache group. vLLM asks
its tiers to store rows by key, and to load them again. The modules of this package; those that do not import vLLM come
first:

    shape       what vLLM tells a tier about the cache: groups, rows, ranks.
    v4_pages    the position of each part of a V4 row; recognizes whether a row is V4's.
    v4_rows     stores V4 rows as our blocks and checkpoints.
    whole_rows  stores rows of all other models, and of unknown layouts, as they are.
    naming      the properties of model and layout that the records' names depend on.
    lookups     lookups that do not block.   transfers  store and load jobs in threads, bounded.
    aligned     the rule that compact windows need: a V4 hit ends at the end of a block.
    tier, spec  the classes that vLLM loads; nothing else here imports vLLM.
"""
