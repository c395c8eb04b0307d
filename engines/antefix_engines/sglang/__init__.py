"""Antefix as SGLang's third cache tier (HiCache storage), by configuration alone: docs/ENGINES.md has the command.

`hicache` has the class that SGLang loads, `pages` the memory of its host pools, `pool_records` a pool's names and
records, `settings` what SGLang's configuration says.
"""
