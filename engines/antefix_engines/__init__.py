"""Antefix under other people's engines: transformers, vLLM, SGLang, LMCache. Optional; nothing of the core imports it.

What all of them share:
    `engine_layout.EngineLayout`  what a block and a checkpoint hold, part by part, and how that is named.
    `engine_store.EngineStore`    one store as an engine uses it: names, seals, and errors that become misses.
    `verify.findings_of`          what `antefix verify --engine NAME` runs for an engine.
    `metrics.engine_metrics`      what an engine's store shows to Prometheus.
    `v4_entries.compare`          two engines' stored entries of one V4 prompt, entry by entry; `v4_runs` makes them.

A new engine describes its KV as an `EngineLayout`, puts that into an `antefix.block.Fingerprint` as its geometry, and
gives both to `EngineStore.kv`. It names blocks by tokens (`KvOfModel.chain`), or by keys that the engine makes
(`KvOfModel.hash_of`, with `hash_kind=HashKind.ENGINE_KEY` in the fingerprint). `Fingerprint.group` and `.shard` are for
engines that keep several groups apart, or cut one over ranks. A package is imported by the module of its engine alone,
so that none needs the packages of another.
"""
