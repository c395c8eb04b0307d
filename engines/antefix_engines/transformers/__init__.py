"""Antefix under Hugging Face transformers: prefix caching on disk for `generate`.

    cache = AntefixCache(model, "antefix-data")
    past = cache.prefill(model, ids)               # reads what is stored, computes and stores the rest
    model.generate(ids, past_key_values=past)

`cache_rows` knows what each kind of layer keeps, `payloads` and `kv_encoding` how that becomes bytes, `model_identity`
what a model's KV depends on, `stored_prefix` the store, `watched_cache` how a cache was filled. `antefix_cache` joins
them; `check` compares cold and restored runs for `antefix verify`.
"""

from antefix_engines.transformers.antefix_cache import AntefixCache, SaveReport
from antefix_engines.transformers.watched_cache import RestoreReport, WatchedCache

__all__ = ["AntefixCache", "RestoreReport", "SaveReport", "WatchedCache"]
