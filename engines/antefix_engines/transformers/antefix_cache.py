"""Prefix caching for one transformers model: restore, prefill in whole blocks, save.

A block is also the chunk of prefill. The last bits of KV depend on how a prompt is cut. So prompts are computed here in
chunks that end at multiples of `block_size`, and a hit at any of these ends equals a cold run with the same chunks to
the bit.
"""

from __future__ import annotations

import inspect
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

import torch
from torch import Tensor

from antefix.block import Family, Fingerprint
from antefix.errors import InvalidRequest
from antefix_engines.engine_layout import EngineLayout
from antefix_engines.engine_store import EngineStore, KvOfModel, StoreSettings
from antefix_engines.transformers import model_identity
from antefix_engines.transformers.cache_rows import rows_of
from antefix_engines.transformers.kv_encoding import ENCODINGS, KvEncoding
from antefix_engines.transformers.payloads import CachePayloads
from antefix_engines.transformers.stored_prefix import PrefixWriter, StoredPrefix, read_prefix
from antefix_engines.transformers.watched_cache import RestoreReport, WatchedCache

BLOCK_SIZE: Final = 128
# Limit on the states of a model (weights and set-up) whose layout is remembered.
_NUM_SERVED_MAX: Final = 8
# Config fields of tokens that stand for images, video or sound: their KV depends on more than their ids.
_NOT_TEXT: Final = tuple(f"{kind}_token_{field}" for kind in ("image", "video", "audio") for field in ("id", "index"))


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveReport:
    """num_stored: records that this call gave to the store and that are stored now.

    num_unknown_tokens: tokens left out because they were not computed in whole blocks (generated tokens, or the last
    part of a block): a cold run would give them other last bits.
    """

    num_tokens: int
    num_stored: int
    num_unknown_tokens: int


@dataclass(frozen=True, slots=True)
class _Served:
    """A model in its present state: what its KV cache holds, and its records in the store."""

    payloads: CachePayloads
    kv: KvOfModel


class AntefixCache:
    """Blocks of one model in a store. The object is thread-safe; it takes one sequence at a time, never a batch.

    No call fails because of the store: blocks that it cannot deliver are computed.
    """

    def __init__(
        self,
        model: Any,
        store: EngineStore | StoreSettings | Path | str,
        *,
        block_size: int = BLOCK_SIZE,
        kv_format: str = "exact",
        checkpoint_every: int = 1,
        namespace: str = "default",
        weights_revision: str = "",
    ) -> None:
        """store: an open store, which the caller closes, or its settings; a path is the folder of a store in this
        process.

        block_size: tokens per block and per pass of prefill; with larger ones prefill is faster and hits have coarser
        steps.
        kv_format: "exact" keeps the cache's numbers to the bit; "fp8" takes a half or a quarter of the bytes, and its
        hits are approximate.  checkpoint_every: a model with windows can be restored at every so many blocks, and at a
        prompt's last block.  namespace: requests share KV only within a namespace.
        weights_revision: identifies the weights, which are then not hashed.
        Raises:  InvalidRequest: a model whose kind of cache cannot be stored, or a setting that does not fit the model.
        """
        if kv_format not in ENCODINGS:
            raise InvalidRequest(f"kv_format must be one of {', '.join(ENCODINGS)}, is {kv_format!r}")
        if block_size < 1 or checkpoint_every < 1:
            raise InvalidRequest("block_size and checkpoint_every must be at least 1")
        self.block_size: Final = block_size
        self.kv_format: Final = kv_format
        self._model: Final = model
        self._encoding: Final[KvEncoding] = ENCODINGS[kv_format]
        self._checkpoint_every: Final = checkpoint_every
        self._namespace: Final = namespace
        self._weights_revision: Final = weights_revision
        self._served: Final[dict[tuple[str, str], _Served]] = {}
        self._lock: Final = threading.Lock()
        payloads, bits = self._probe(model)
        self._owns_store: Final = not isinstance(store, EngineStore)
        self.store: Final[EngineStore] = _open(store)
        self._serve(model, payloads, bits)

    @property
    def layout(self) -> EngineLayout:
        """The parts that a block and a checkpoint of this model hold."""
        return self.payloads.layout

    @property
    def payloads(self) -> CachePayloads:
        """Converts the cache of this model to bytes; for comparisons."""
        return self._of(self._model).payloads

    @property
    def kv(self) -> KvOfModel:
        """This model's records, for comparisons."""
        return self._of(self._model).kv

    def close(self) -> None:
        """Close the store, if it was opened here."""
        if self._owns_store:
            self.store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def empty_cache(self) -> WatchedCache:
        """An empty cache. A cold run may begin with this empty cache, and `save` accepts it."""
        return WatchedCache(config=self._model.config, block_size=self.block_size)

    def restore(self, ids: Tensor | Sequence[int]) -> WatchedCache:
        """The stored part of a prompt, as a cache that `generate` takes; its `report` says how much. Computes nothing.

        At least one token is left to compute, because `generate` needs its logits.
        """
        started = time.monotonic()
        tokens = self._tokens(ids)
        served = self._of(self._model)
        chain = served.kv.chain(tokens)
        prefix = read_prefix(served.kv, chain, _num_usable(tokens, self.block_size))
        cache = self.empty_cache()
        if prefix.num_blocks:
            served.payloads.fill(cache, prefix.blocks, prefix.checkpoints, prefix.num_blocks)
        cache.num_exact_tokens = prefix.num_blocks * self.block_size
        cache.hashes = chain.hashes[: prefix.num_blocks]
        cache.report = self._report(prefix, len(tokens), time.monotonic() - started)
        return cache

    def prefill(self, model: Any, ids: Tensor | Sequence[int]) -> WatchedCache:
        """Restore the stored part of a prompt, compute the rest of its whole blocks one by one, and store these.

        The cache then holds all of the prompt but its last 1 to `block_size` tokens, which `generate` computes.
        Raises:  InvalidRequest: a model with other weights than this cache is for, or in training mode.
        """
        if model is not self._model and self._names(model) != self._names(self._model):
            raise InvalidRequest(
                "this model has other weights or settings than the model that this AntefixCache was made for: make "
                "a new AntefixCache"
            )
        _check_mode(model)
        tokens = self._tokens(ids)
        cache = self.restore(tokens)
        served = self._of(model)
        chain = served.kv.chain(tokens)
        num_blocks = _num_usable(tokens, self.block_size)
        writer = PrefixWriter(served.kv, chain, num_blocks=num_blocks, every=self._checkpoint_every)
        row = torch.tensor([tokens], dtype=torch.long, device=model_identity.device_of(model))
        for index in range(len(cache.hashes), num_blocks):
            end = (index + 1) * self.block_size
            _compute(model, row[:, end - self.block_size : end], cache)
            cache.hashes.append(chain.hashes[index])
            kept = writer.keeps_checkpoint(index + 1)
            checkpoint = served.payloads.checkpoint(cache, index, end) if kept else None
            writer.add(index, served.payloads.block(cache, index), checkpoint)
        writer.finish()
        return cache

    def save(self, cache: WatchedCache, ids: Tensor | Sequence[int]) -> SaveReport:
        """Store the blocks of these tokens that the cache holds and the store lacks.

        Only blocks that were restored, or computed by a pass over exactly that block, equal a cold run's. Others are
        left out and counted.
        Raises:  InvalidRequest: a cache that neither `restore` nor `prefill` nor `empty_cache` made, since it is not
        known how
            its prompt was cut, or a cache of other tokens.
        """
        if not isinstance(cache, WatchedCache):
            raise InvalidRequest(
                "save takes only caches that restore or prefill made: the chunks of another cache are not known"
            )
        tokens = self._tokens(ids)
        served = self._of(self._model)
        chain = served.kv.chain(tokens)
        if cache.block_size != self.block_size or cache.hashes != chain.hashes[: len(cache.hashes)]:
            raise InvalidRequest("the cache was made for other tokens, for another block size or for another model")
        num_tokens = cache.get_seq_length()
        num_blocks = min(cache.num_exact_tokens // self.block_size, len(chain))
        found = served.kv.lookup(chain.hashes[:num_blocks])
        writer = PrefixWriter(served.kv, chain, num_blocks=num_blocks, every=self._checkpoint_every)
        for index in range(num_blocks):
            block = served.payloads.block(cache, index) if index >= found.num_blocks else None
            is_wanted = writer.keeps_checkpoint(index + 1) and index + 1 not in found.checkpoints
            writer.add(index, block, served.payloads.checkpoint(cache, index, num_tokens) if is_wanted else None)
        cache.hashes = chain.hashes[:num_blocks]
        return SaveReport(
            num_tokens=num_tokens,
            num_stored=writer.finish(),
            num_unknown_tokens=num_tokens - num_blocks * self.block_size,
        )

    def _report(self, prefix: StoredPrefix, num_tokens: int, seconds: float) -> RestoreReport:
        is_exact = self._encoding.is_exact or not prefix.num_blocks
        reasons = (prefix.why, "" if is_exact else "FP8 keeps two digits: approximate")
        return RestoreReport(
            num_tokens=num_tokens,
            num_cached_tokens=prefix.num_blocks * self.block_size,
            num_stored_tokens=prefix.num_known * self.block_size,
            is_exact=is_exact,
            kv_format=self.kv_format,
            nbytes=len(prefix.blocks) + len(prefix.checkpoints),
            seconds=seconds,
            why="; ".join(filter(None, reasons)),
        )

    def _names(self, model: Any) -> tuple[str, str]:
        """The parts of a model's identity that go into its blocks' names, except measured bits."""
        return model_identity.revision_of(model, self._weights_revision), model_identity.arithmetic_of(model)

    def _of(self, model: Any) -> _Served:
        """The model in its present state: weights, dtype and settings may have changed since the last call."""
        with self._lock:
            served = self._served.get(self._names(model))
        return served or self._serve(model, *self._probe(model))

    def _serve(self, model: Any, payloads: CachePayloads, bits: str) -> _Served:
        names = self._names(model)
        fingerprint = Fingerprint(
            weights_revision=names[0],
            geometry=payloads.layout,
            kv_format=self.kv_format,
            tokenizer="",
            exactness="exact" if self._encoding.is_exact else "approximate",
            arithmetic=f"{names[1]}-bits:{bits}",
            namespace=self._namespace,
            family=payloads.layout.family,
        )
        served = _Served(payloads, self.store.kv(fingerprint, payloads.layout))
        with self._lock:
            # During training, each step makes another state of the model.
            while len(self._served) >= _NUM_SERVED_MAX:
                del self._served[next(iter(self._served))]
            return self._served.setdefault(names, served)

    def _probe(self, model: Any) -> tuple[CachePayloads, str]:
        """Find out what the model's cache keeps, and which bits it computes, by running one block.

        For some models, running a block is the only way to find this out. On a GPU, bits may differ from run to run,
        so on a GPU bits are not part of names.
        """
        _check_mode(model)
        if getattr(model.config, "is_encoder_decoder", False):
            raise InvalidRequest(
                "a model with an encoder cannot be cached: its decoder's KV depends on more than the decoder's tokens"
            )
        device = model_identity.device_of(model)
        cache = WatchedCache(config=model.config, block_size=self.block_size)
        vocab_size = model.config.get_text_config(decoder=True).vocab_size
        ids = torch.arange(self.block_size, dtype=torch.long, device=device)[None] * 7919 % vocab_size
        _compute(model, ids, cache)
        family = _family_of(model)
        layers = rows_of(cache, self.block_size, is_v4=family is Family.V4)
        payloads = CachePayloads(layers, self._encoding, block_size=self.block_size, family=family)
        return payloads, payloads.bits_of(cache) if device.type == "cpu" else "any"

    def _tokens(self, ids: Tensor | Sequence[int]) -> list[int]:
        """Raises:  InvalidRequest: a batch, no integers, or tokens that stand for an image or sound."""
        tensor = torch.as_tensor(ids)
        if tensor.ndim == 2 and tensor.shape[0] == 1:
            tensor = tensor[0]
        if tensor.ndim != 1 or tensor.is_floating_point():
            raise InvalidRequest(
                f"only one sequence of token ids at a time can be cached, not a tensor of shape {tuple(tensor.shape)}"
            )
        tokens = [int(token) for token in tensor.tolist()]
        special = {getattr(self._model.config, name, None) for name in _NOT_TEXT}
        if found := special.intersection(tokens):
            raise InvalidRequest(
                f"token {found.pop()} stands for an image or a sound: its KV depends on more than the token's id"
            )
        return tokens


def _compute(model: Any, row: Tensor, cache: WatchedCache) -> None:
    """One pass. Logits are computed only for the last token, because logits for all tokens would cost more than a small
    model itself.
    """
    less = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    with torch.no_grad():
        model(input_ids=row, past_key_values=cache, use_cache=True, **less)


def _num_usable(tokens: Sequence[int], block_size: int) -> int:
    """The number of whole blocks that leaves at least one token to compute."""
    return max(len(tokens) - 1, 0) // block_size


def _check_mode(model: Any) -> None:
    if getattr(model, "training", False):
        raise InvalidRequest("the model is in training mode, where dropout changes its KV: call model.eval()")


def _open(store: EngineStore | StoreSettings | Path | str) -> EngineStore:
    if isinstance(store, EngineStore):
        return store
    return EngineStore.open(store if isinstance(store, StoreSettings) else StoreSettings(directory=str(store)))


def _family_of(model: Any) -> Family:
    config = model.config.get_text_config(decoder=True)
    if config.model_type == "deepseek_v4":
        return Family.V4
    return Family.MLA if getattr(config, "kv_lora_rank", None) else Family.GQA
