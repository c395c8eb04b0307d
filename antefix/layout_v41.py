"""KV geometry and record formats of DeepSeek-V4.1: what it stores, how long its replays are, how its names differ.
Antefix does not compute this model (`layout.other_model_type` says what is missing). Other inference engines that
compute this model store its KV with this module.

In V4.1 only some layers have a cache. A layer whose `compress_ratios` is not 0 reads global KV. Only the KV sources
(kv_source_layer_ids) write global KV; each other layer reads the KV of the nearest source before it. So 4 of 40 layers
have global KV, and a token takes 890 bytes. The layers that select entries are listed separately
(index_source_layer_ids); other layers reuse their selections.

    part of a block     one for each      one record                                                       bytes
    main entries        KV source         512 E2M1 codes, 2 per byte (RoPE dims too), E4M3 scale per 16    288
    indexer keys        KV source         128 E2M1 codes, 2 per byte, UE8M0 scale per 32                   68
    part of a checkpoint
    window entries      layer, n_win      as in V4: FP8 codes, BF16 RoPE dims, UE8M0 scales                584
    overlap rows        source of ratio   kv and gate of the last group's tokens, as floats                4 per number
                        2 or more

Sources: arXiv 2609.19969, section 3.2, and the config of the release. Indexer keys are projected from the main
latents, so they have no compressor and no overlap of their own. Ratio 1 has neither gate nor pooling.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from functools import cached_property
from typing import Any

from antefix.errors import InvalidRequest
from antefix.layout import FP4_GROUP, FP8_GROUP, SCALE_ALIGN, Field, RecordLayout, Rows

MODEL_TYPE = "deepseek_v41"
# Channels that share an E4M3 scale in a main entry.
ENTRY_GROUP = 16
# Tokens per block. Any common multiple of the ratios would do; this is V4's value.
BLOCK_TOKENS = 128
FLOAT_BYTES = 4


class LayerRole(StrEnum):
    """How a layer of DeepSeek-V4.1 takes part in global KV.

    window: the layer uses no global KV. full: it writes global KV and selects entries. reindex: it selects entries of
    another layer's KV. reuse: it reads another layer's KV with another layer's selection.
    """

    WINDOW = "window"
    FULL = "full"
    REINDEX = "reindex"
    REUSE = "reuse"


class V41PartKind(StrEnum):
    MAIN = "v41_main"
    KEYS = "v41_keys"


@dataclass(frozen=True, slots=True, kw_only=True)
class V41Part:
    """`num_rows` records of one KV source, starting `offset` bytes into the block's payload."""

    layer: int
    kind: V41PartKind
    offset: int
    num_rows: int
    record: RecordLayout

    @property
    def nbytes(self) -> int:
        return self.num_rows * self.record.nbytes


@dataclass(frozen=True, kw_only=True)
class V41Geometry:
    """The shape of a V4.1 model's KV. Blocks of models with equal geometries are interchangeable.

    ratios: for each layer, tokens per entry of the global KV that it reads; 0: it reads none.
    kv_sources, index_sources: layer numbers, ascending.
    """

    ratios: tuple[int, ...]
    kv_sources: tuple[int, ...]
    index_sources: tuple[int, ...]
    head_dim: int
    rope_dim: int
    indexer_dim: int
    window: int
    block_size: int = BLOCK_TOKENS

    def __post_init__(self) -> None:
        for name in ("head_dim", "rope_dim", "indexer_dim", "window", "block_size"):
            if getattr(self, name) < 1:
                raise InvalidRequest(f"{name} must be positive, is {getattr(self, name)}")
        if self.head_dim % ENTRY_GROUP or self.indexer_dim % FP4_GROUP:
            raise InvalidRequest(
                f"head_dim must be a multiple of {ENTRY_GROUP} and index_head_dim of {FP4_GROUP}, are"
                f" {self.head_dim} and {self.indexer_dim}"
            )
        self._check_sources()

    def _check_sources(self) -> None:
        for name, layers in (("kv_source_layer_ids", self.kv_sources), ("index_source_layer_ids", self.index_sources)):
            if list(layers) != sorted(set(layers)) or not all(0 <= layer < len(self.ratios) for layer in layers):
                raise InvalidRequest(f"{name} must name layers in ascending order, is {list(layers)}")
        if not set(self.kv_sources) <= set(self.index_sources):
            raise InvalidRequest("index_source_layer_ids must have all of kv_source_layer_ids")
        for layer, ratio in enumerate(self.ratios):
            source = self.source(layer)
            if ratio and (source is None or self.ratios[source] != ratio):
                raise InvalidRequest(
                    f"layer {layer} reads a cache of ratio {ratio}, but the KV source before it makes no cache of"
                    " that ratio"
                )
        odd = [layer for layer in self.index_sources if not self.ratios[layer]]
        if odd:
            raise InvalidRequest(
                f"layer {odd[0]} has compress ratio 0 and cannot be a source of index results for other layers"
            )
        if self.block_size % math.lcm(*(self.ratios[layer] for layer in self.kv_sources), 1):
            raise InvalidRequest(
                f"a block of {self.block_size} tokens must be a multiple of all compress ratios, {self.ratios}"
            )

    @property
    def num_layers(self) -> int:
        return len(self.ratios)

    def source(self, layer: int) -> int | None:
        """The layer whose global KV this layer reads; None: it reads none."""
        if not self.ratios[layer]:
            return None
        return max((source for source in self.kv_sources if source <= layer), default=None)

    def role(self, layer: int) -> LayerRole:
        if not self.ratios[layer]:
            return LayerRole.WINDOW
        if layer in self.kv_sources:
            return LayerRole.FULL
        return LayerRole.REINDEX if layer in self.index_sources else LayerRole.REUSE

    @cached_property
    def replay_reach(self) -> tuple[int, ...]:
        """For each layer, how many of the last tokens before a block's end affect the window state there.

        As in `KVGeometry.replay_reach`, a replay reads global KV from the store, whichever layer wrote it. A KV source
        with several tokens per group also keeps the rows of the last group.
        """
        reach: list[int] = []
        for layer in reversed(range(self.num_layers)):
            own = max(self.window, self.ratios[layer]) if self._has_overlap(layer) else self.window
            reach.append(max(own, reach[-1] + self.window - 1) if reach else own)
        return tuple(reversed(reach))

    @property
    def replay_tokens(self) -> int:
        """How many tokens an exact replay runs, in whole blocks."""
        return -(-self.replay_reach[0] // self.block_size) * self.block_size

    @property
    def bounded_tokens(self) -> int:
        """How many tokens V4.1's own, approximate replay runs: one window."""
        return self.window

    def _has_overlap(self, layer: int) -> bool:
        return layer in self.kv_sources and self.ratios[layer] > 1

    @property
    def overlap_sources(self) -> tuple[int, ...]:
        return tuple(layer for layer in self.kv_sources if self._has_overlap(layer))

    def digest(self) -> bytes:
        """The 16 bytes that name this geometry; they are part of the fingerprint, whose family is V41."""
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=16, person=b"antefix-geom-v41").digest()

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> V41Geometry:
        """Read a `deepseek_v41` config.json; the text model's fields are under `text_config` there.

        Raises:  InvalidRequest: another model type, or a field is missing or invalid.
        """
        if config.get("model_type") != MODEL_TYPE:
            raise InvalidRequest(f"model_type must be {MODEL_TYPE}, is {config.get('model_type')!r}")
        text = config.get("text_config", config)
        if not isinstance(text, Mapping):
            raise InvalidRequest(f"config field text_config must be an object, is {text!r:.100}")
        num_layers = _count(text, "num_hidden_layers")
        ratios = _counts(text, "compress_ratios")
        if len(ratios) < num_layers:
            raise InvalidRequest(f"compress_ratios must give {num_layers} numbers, gives {len(ratios)}")
        return cls(
            # The ratios after the last layer belong to the draft modules.
            ratios=ratios[:num_layers],
            kv_sources=_counts(text, "kv_source_layer_ids"),
            index_sources=_counts(text, "index_source_layer_ids"),
            head_dim=_count(text, "head_dim"),
            rope_dim=_count(text, "qk_rope_head_dim"),
            indexer_dim=_count(text, "index_head_dim"),
            window=_count(text, "sliding_window"),
        )


@dataclass(frozen=True, kw_only=True)
class V41Layout:
    """The offset of each source's records in a block's payload, and the parts of a checkpoint (table above)."""

    geometry: V41Geometry

    @property
    def block_size(self) -> int:
        return self.geometry.block_size

    @cached_property
    def parts(self) -> tuple[V41Part, ...]:
        """The parts of a block: for each source, its main entries, then its indexer keys."""
        records = {V41PartKind.MAIN: main_record(self.geometry), V41PartKind.KEYS: v41_key_record(self.geometry)}
        parts: list[V41Part] = []
        offset = 0
        for layer in self.geometry.kv_sources:
            num_rows = self.block_size // self.geometry.ratios[layer]
            for kind, record in records.items():
                parts.append(V41Part(layer=layer, kind=kind, offset=offset, num_rows=num_rows, record=record))
                offset += parts[-1].nbytes
        return tuple(parts)

    @cached_property
    def checkpoint_parts(self) -> tuple[Rows, ...]:
        geometry = self.geometry
        window = Rows(num_rows=geometry.num_layers * geometry.window, record=window_record(geometry))
        numbers = sum(2 * geometry.ratios[layer] * geometry.head_dim for layer in geometry.overlap_sources)
        if not numbers:
            return (window,)
        number = Field(name="values", offset=0, nbytes=FLOAT_BYTES, width=FLOAT_BYTES)
        return window, Rows(num_rows=numbers, record=RecordLayout(fields=(number,)))

    @cached_property
    def block_bytes(self) -> int:
        return max(sum(part.nbytes for part in self.parts), 1)

    @property
    def bytes_per_token(self) -> float:
        return self.block_bytes / self.block_size

    @cached_property
    def checkpoint_bytes(self) -> int:
        return sum(rows.num_rows * rows.record.nbytes for rows in self.checkpoint_parts)


def main_record(geometry: V41Geometry) -> RecordLayout:
    """One main entry: FP4 codes, two per byte, then E4M3 scales (V4.1: 288 bytes)."""
    codes, scales = geometry.head_dim // 2, geometry.head_dim // ENTRY_GROUP
    return RecordLayout(
        fields=(
            Field(name="codes", offset=0, nbytes=codes, width=1),
            Field(name="scales", offset=codes, nbytes=scales, width=1),
        )
    )


def v41_key_record(geometry: V41Geometry) -> RecordLayout:
    """One indexer key: FP4 codes, two per byte, then UE8M0 scales (V4.1: 68 bytes, as in V4)."""
    codes, scales = geometry.indexer_dim // 2, geometry.indexer_dim // FP4_GROUP
    return RecordLayout(
        fields=(
            Field(name="codes", offset=0, nbytes=codes, width=1),
            Field(name="scales", offset=codes, nbytes=scales, width=1),
        )
    )


def window_record(geometry: V41Geometry) -> RecordLayout:
    """One window entry, as in V4: FP8 codes, BF16 RoPE dims, UE8M0 scales with padding (584 bytes)."""
    codes, rope = geometry.head_dim - geometry.rope_dim, 2 * geometry.rope_dim
    scales = -(-max(codes, 1) // FP8_GROUP)
    scales += -(codes + rope + scales) % SCALE_ALIGN
    return RecordLayout(
        fields=(
            Field(name="codes", offset=0, nbytes=codes, width=1),
            Field(name="rope", offset=codes, nbytes=rope, width=2),
            Field(name="scales", offset=codes + rope, nbytes=scales, width=1),
        )
    )


def _count(fields: Mapping[str, Any], name: str) -> int:
    value = fields.get(name)
    if type(value) is not int or value < 1:
        raise InvalidRequest(f"config field {name} must be a positive integer, is {value!r:.100}")
    return value


def _counts(fields: Mapping[str, Any], name: str) -> tuple[int, ...]:
    value = fields.get(name)
    if not isinstance(value, list) or not all(type(n) is int and n >= 0 for n in value):
        raise InvalidRequest(f"config field {name} must be a list of non-negative integers, is {value!r:.100}")
    return tuple(value)
