"""Antefix as a disk tier of vLLM: `AntefixTier`, which vLLM loads by its configuration (docs/ENGINES.md).

vLLM copies finished blocks of its KV cache into *rows* of host memory, one row per block of one cache group, and asks
its tiers to keep and to bring back rows by key. The parts, from the pure to vLLM's own:

    shape       what a tier is told of the cache: groups, rows, ranks.
    v4_pages    where a V4 row holds which bytes, or that it is no such row.
    v4_rows     rows of V4 as our blocks and checkpoints.
    whole_rows  rows of every other model, and of layouts that we do not know, as they are.
    naming      what the names of all that bind.
    lookups     questions that do not wait.   transfers  jobs in threads, bounded.
    aligned     the rule that compact windows need: a V4 hit ends where a block ends.
    tier, spec  the classes that vLLM loads; nothing else here imports vLLM.
"""
