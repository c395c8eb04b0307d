"""What the names of vLLM's rows depend on: weights, layout, arithmetic. vLLM's own block hash identifies the tokens.

vLLM chains SHA-256 over tokens, LoRA and cache salt, but nothing else of the model: two models with one tokenizer give
equal hashes. The fingerprint has the other facts, so that KV of other weights, dtype or layout has another name.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from antefix.block import Family, Fingerprint, HashKind
from antefix.errors import ConfigError
from antefix.model_dir import CONFIG_FILE, INDEX_FILE, hash_files
from antefix_engines.engine_layout import EngineLayout
from antefix_engines.vllm.shape import Shape

log = logging.getLogger("antefix.engines.vllm")

# Raise this when rows get another meaning although vLLM describes them as before; stored rows then become misses.
ROWS_VERSION: Final = 1
# vLLM's other hashes (xxhash) are shorter, and anybody can make two prompts with the same hash.
HASH_BYTES_MIN: Final = 32
_SNAPSHOT: Final = re.compile(r"/snapshots/([0-9a-f]{40})$")


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """What a tier's names depend on besides the layout."""

    weights_revision: str
    arithmetic: str
    namespace: str
    num_ranks: int
    kv_format: str

    def fingerprint(self, layout: EngineLayout, *, group: str = "", shard: str = "") -> Fingerprint:
        return Fingerprint(
            weights_revision=self.weights_revision,
            geometry=layout,
            kv_format=self.kv_format,
            # vLLM hashes token ids, so the tokenizer does not matter.
            tokenizer="",
            arithmetic=self.arithmetic,
            namespace=self.namespace,
            family=layout.family if layout.family is Family.V4 else Family.OPAQUE,
            num_cards=self.num_ranks,
            hash_kind=HashKind.ENGINE_KEY,
            group=group,
            shard=shard,
        )


def identity_of(
    shape: Shape, *, weights_revision: str, arithmetic: str, default_arithmetic: str, namespace: str
) -> Identity:
    """arithmetic: a name that the operator gives to set-ups that compute alike; empty: the default, together with the
    number of ranks, because sums over ranks depend on it.
    """
    return Identity(
        weights_revision=weights_revision or revision_of(shape.model),
        arithmetic=arithmetic or default_arithmetic,
        namespace=namespace,
        num_ranks=1 if arithmetic else shape.tp_size,
        kv_format=f"{shape.dtype}/{shape.layout or 'plain'}/{ROWS_VERSION}",
    )


def revision_of(model: str) -> str:
    """Identifies the weights of a model, given as vLLM was given it.

    Raises:  ConfigError: it is not a folder with weights, so the weights cannot be identified here.
    """
    path = Path(model)
    found = _SNAPSHOT.search(str(path.resolve()))
    if path.is_dir() and found:
        return found[1]
    weights = sorted(path.glob("*.safetensors")) if path.is_dir() else []
    if not weights:
        raise ConfigError(
            f"the Antefix tier must know the weights whose KV it stores, and {model!r} is no directory with "
            "*.safetensors: give `weights_revision` in its configuration, for example the commit on the hub"
        )
    nbytes = sum(file.stat().st_size for file in weights)
    log.info("hashing %.1f GB of weights to name their KV; the setting `weights_revision` avoids this", nbytes / 1e9)
    described = [path / name for name in (CONFIG_FILE, INDEX_FILE) if (path / name).is_file()]
    return hash_files([*described, *weights])
