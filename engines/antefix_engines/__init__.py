"""Antefix's store under other inference engines: transformers, vLLM, SGLang, LMCache. These engines are optional: the
core of Antefix never imports this package.

Shared by all engines:
    `engine_layout.EngineLayout`  describes the parts of a block and a checkpoint, and names the layout.
    `engine_store.EngineStore`    one store as an engine uses it: names, seals, and errors that become misses.
    `verify.findings_of`          the checks that `antefix verify --engine NAME` runs for an engine.
    `metrics.engine_metrics`      the Prometheus metrics of an engine's store.
    `v4_entries.compare`          compares two engines' stored entries of one V4 prompt; `v4_runs` makes these entries.

A new engine describes its KV as an `EngineLayout`, puts that into an `antefix.block.Fingerprint` as its geometry, and
gives both to `EngineStore.kv`. `EngineStore.kv` names blocks by tokens (`KvOfModel.chain`), or by keys that the engine
makes (`KvOfModel.hash_of`, with `hash_kind=HashKind.ENGINE_KEY` in the fingerprint). `Fingerprint.group` and `.shard`
are for engines that have several cache groups, or divide one over ranks. Only the module of an engine imports that
engine's package, so that no engine needs the packages of another.
"""
