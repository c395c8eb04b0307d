"""KV geometry and record formats, derived from a model's config. Knows bytes, never tensors.

Notation (DeepSeek-V4 report, section 2.3): m = CSA ratio, m' = HCA ratio, n_win = window, c = head dim,
c_I = indexer head dim. A block holds `block_size = lcm(m, m')` tokens of global KV of all layers, laid out
layer by layer; a CSA layer's part is its main entries, then its indexer keys. docs/FORMAT.md has the tables.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from functools import cached_property
from typing import Any, Protocol

from antefix.checked_table import shown
from antefix.errors import InvalidRequest
from antefix.rope import COUNT_MAX, read_ropes

# Group sizes of the released inference code: FP8 entries scale in groups of 64, FP4 keys in groups of 32.
FP8_GROUP = 64
FP4_GROUP = 32
# The scale bytes of an entry are padded so that a record is a multiple of 8 bytes (V4: 7 scales + 1 = 8).
SCALE_ALIGN = 8


class LayerKind(StrEnum):
    """How a layer attends beyond its window: not at all (window only), to selected entries (CSA), or to all compressed
    entries (HCA).
    """

    WINDOW = "window"
    CSA = "csa"
    HCA = "hca"


class KVFormat(StrEnum):
    """Precision of KV; the same precision is used in the pool and on disk, so that storing loses nothing.

    FP8 is the released model's format: entries in FP8 E4M3 with BF16 RoPE dims, indexer keys in Hadamard-rotated FP4
    E2M1. FLOAT64 serves comparisons with other implementations only.
    """

    FP8 = "fp8"
    FLOAT32 = "float32"
    FLOAT64 = "float64"

    @property
    def float_bytes(self) -> int:
        """Bytes of one number in KV that is kept as plain floats, and in overlap state and tail buffers."""
        return 8 if self is KVFormat.FLOAT64 else 4


class PartKind(StrEnum):
    """What a contiguous part of a block's payload holds."""

    CSA_MAIN = "csa_main"
    INDEXER_KEYS = "indexer_keys"
    HCA_MAIN = "hca_main"


@dataclass(frozen=True, slots=True, kw_only=True)
class Field:
    """A byte range inside a record. `width` is the size of one item in bytes; byte planes are split by it."""

    name: str
    offset: int
    nbytes: int
    width: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordLayout:
    """The bytes of one entry or key. The fields of a record are adjacent and fill `nbytes`."""

    fields: tuple[Field, ...]

    @property
    def nbytes(self) -> int:
        return sum(f.nbytes for f in self.fields)

    def field(self, name: str) -> Field:
        for field in self.fields:
            if field.name == name:
                return field
        raise KeyError(name)


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """`num_rows` records of one layer, starting `offset` bytes into the block's payload."""

    layer: int
    kind: PartKind
    offset: int
    num_rows: int
    record: RecordLayout

    @property
    def nbytes(self) -> int:
        return self.num_rows * self.record.nbytes


class PayloadPart(Protocol):
    """`num_rows` records of KV, one after the other."""

    @property
    def num_rows(self) -> int: ...

    @property
    def record(self) -> RecordLayout: ...


class PayloadLayout(Protocol):
    """What a store must know about payloads to compress them. `BlockLayout` is V4's; engines have their own."""

    @property
    def block_size(self) -> int:
        """Tokens in a block."""

    @property
    def parts(self) -> Sequence[PayloadPart]:
        """The parts of a block."""

    @property
    def checkpoint_parts(self) -> Sequence[PayloadPart]:
        """The parts of a checkpoint of window state; empty if the model has no checkpoints."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """A part of a payload, known only by its shape."""

    num_rows: int
    record: RecordLayout


@dataclass(frozen=True, kw_only=True)
class KVGeometry:
    """The shape of a model's KV: everything that decides whether two models' blocks are interchangeable.

    This class has no slots, so that the numbers derived from it are computed only once.
    """

    layers: tuple[LayerKind, ...]
    head_dim: int
    rope_dim: int
    indexer_dim: int
    csa_ratio: int
    hca_ratio: int
    window: int

    def __post_init__(self) -> None:
        if not self.layers:
            raise InvalidRequest("a model needs at least one layer")
        for name in ("head_dim", "rope_dim", "indexer_dim", "csa_ratio", "hca_ratio", "window"):
            if getattr(self, name) < 1:
                raise InvalidRequest(f"{name} must be positive, is {getattr(self, name)}")
        if self.rope_dim % 2 or self.rope_dim > self.head_dim:
            raise InvalidRequest(f"rope_dim must be even and at most head_dim {self.head_dim}, is {self.rope_dim}")

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def nope_dim(self) -> int:
        return self.head_dim - self.rope_dim

    @cached_property
    def block_size(self) -> int:
        """Tokens in a block: the smallest span that closes every layer's groups."""
        return math.lcm(self.csa_ratio, self.hca_ratio)

    @property
    def csa_entries_per_block(self) -> int:
        return self.block_size // self.csa_ratio

    @property
    def hca_entries_per_block(self) -> int:
        return self.block_size // self.hca_ratio

    def ratio(self, layer: int) -> int:
        """Tokens per entry of this layer; 0 for a window-only layer."""
        return {LayerKind.WINDOW: 0, LayerKind.CSA: self.csa_ratio, LayerKind.HCA: self.hca_ratio}[self.layers[layer]]

    @cached_property
    def replay_reach(self) -> tuple[int, ...]:
        """For each layer, how many of the last tokens before a block's end affect the window state there.

        A layer's own state is its last n_win window entries and, in a CSA layer, the m overlap rows of its last group.
        A layer's output also feeds the layers above, where each query sees the n_win - 1 tokens before its own. Global
        KV adds nothing to this number of tokens, because a replay reads global KV from the store. Replays of window
        state are planned and run by this bound, which is derived only here. The bound is sharp if window entries are
        counted that are stored but never read again (tests/model traces and measures it).
        """
        reach: list[int] = []
        for kind in reversed(self.layers):
            own = max(self.window, self.csa_ratio) if kind is LayerKind.CSA else self.window
            reach.append(max(own, reach[-1] + self.window - 1) if reach else own)
        return tuple(reversed(reach))

    @property
    def replay_tokens(self) -> int:
        """How many tokens an exact replay must run: the first layer's reach, rounded up to whole blocks."""
        return -(-self.replay_reach[0] // self.block_size) * self.block_size

    def digest(self) -> bytes:
        """The 16 bytes that name this KV geometry; they are part of the fingerprint."""
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=16, person=b"antefix-geometry").digest()

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> KVGeometry:
        """Read a `deepseek_v4` config.json as transformers writes it, including legacy field names.

        Raises:  InvalidRequest: another model type, or a field is missing or invalid.
        """
        return _geometry_from_config(config)


def entry_record(geometry: KVGeometry, kv_format: KVFormat) -> RecordLayout:
    """One main entry or window entry: FP8 codes, BF16 RoPE dims, UE8M0 scales with padding (V4: 584 bytes)."""
    if kv_format is not KVFormat.FP8:
        width = kv_format.float_bytes
        return RecordLayout(fields=(Field(name="values", offset=0, nbytes=geometry.head_dim * width, width=width),))
    codes = geometry.nope_dim
    rope = geometry.rope_dim * 2
    scales = -(-max(codes, 1) // FP8_GROUP)
    scales += -(codes + rope + scales) % SCALE_ALIGN
    return RecordLayout(
        fields=(
            Field(name="codes", offset=0, nbytes=codes, width=1),
            Field(name="rope", offset=codes, nbytes=rope, width=2),
            Field(name="scales", offset=codes + rope, nbytes=scales, width=1),
        )
    )


def key_record(geometry: KVGeometry, kv_format: KVFormat) -> RecordLayout:
    """One indexer key: FP4 codes, two per byte (low nibble first), then UE8M0 scales (V4: 68 bytes)."""
    if kv_format is not KVFormat.FP8:
        width = kv_format.float_bytes
        return RecordLayout(fields=(Field(name="values", offset=0, nbytes=geometry.indexer_dim * width, width=width),))
    if geometry.indexer_dim & (geometry.indexer_dim - 1) or geometry.indexer_dim < 2:
        raise InvalidRequest(
            "fp8 keys of the indexer need an indexer_dim that is a power of two (for the Hadamard transform), is "
            f"{geometry.indexer_dim}"
        )
    codes = geometry.indexer_dim // 2
    scales = -(-geometry.indexer_dim // FP4_GROUP)
    return RecordLayout(
        fields=(
            Field(name="codes", offset=0, nbytes=codes, width=1),
            Field(name="scales", offset=codes, nbytes=scales, width=1),
        )
    )


@dataclass(frozen=True, kw_only=True)
class BlockLayout:
    """The offset of each layer's records in a block's payload. A row of a block pool has the same layout as a block's
    payload.
    """

    geometry: KVGeometry
    kv_format: KVFormat

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        entry = entry_record(self.geometry, self.kv_format)
        key = key_record(self.geometry, self.kv_format)
        plan = {
            LayerKind.WINDOW: (),
            LayerKind.CSA: (
                (PartKind.CSA_MAIN, self.geometry.csa_entries_per_block, entry),
                (PartKind.INDEXER_KEYS, self.geometry.csa_entries_per_block, key),
            ),
            LayerKind.HCA: ((PartKind.HCA_MAIN, self.geometry.hca_entries_per_block, entry),),
        }
        parts: list[Part] = []
        offset = 0
        for layer, layer_kind in enumerate(self.geometry.layers):
            for kind, num_rows, record in plan[layer_kind]:
                parts.append(Part(layer=layer, kind=kind, offset=offset, num_rows=num_rows, record=record))
                offset += parts[-1].nbytes
        return tuple(parts)

    @property
    def block_size(self) -> int:
        return self.geometry.block_size

    @cached_property
    def checkpoint_parts(self) -> tuple[Rows, ...]:
        """Window entries of all layers, then overlap states as floats."""
        entry = entry_record(self.geometry, self.kv_format)
        parts = [Rows(num_rows=self.geometry.num_layers * self.geometry.window, record=entry)]
        if self.overlap_bytes:
            width = self.kv_format.float_bytes
            floats = Field(name="values", offset=0, nbytes=self.overlap_bytes, width=width)
            parts.append(Rows(num_rows=1, record=RecordLayout(fields=(floats,))))
        return tuple(parts)

    @cached_property
    def block_bytes(self) -> int:
        """Bytes of a block's payload. A model of window-only layers has no global KV, but stores accept no empty
        payload. So each block of such a model has one zero byte; a stored block then shows that its tokens have been
        computed.
        """
        return max(sum(part.nbytes for part in self.parts), 1)

    @property
    def bytes_per_token(self) -> float:
        return self.block_bytes / self.geometry.block_size

    @cached_property
    def window_bytes(self) -> int:
        """Bytes of window KV: the last n_win tokens of all layers (V4-Flash: 3.21 MB)."""
        record = entry_record(self.geometry, self.kv_format)
        return self.geometry.num_layers * self.geometry.window * record.nbytes

    @cached_property
    def overlap_bytes(self) -> int:
        """Bytes of CSA overlap state: kv and gate rows of the last group's Ca series, main and indexer, as floats."""
        num_csa = sum(kind is LayerKind.CSA for kind in self.geometry.layers)
        width = self.geometry.head_dim + self.geometry.indexer_dim
        return num_csa * 2 * self.geometry.csa_ratio * width * self.kv_format.float_bytes

    @property
    def checkpoint_bytes(self) -> int:
        """Bytes of a checkpoint's payload: window KV and overlap state. Tail buffers (rows of groups of tokens that are
        not complete) are empty at a block boundary.
        """
        return self.window_bytes + self.overlap_bytes


# The largest model has 61 layers. Each layer creates objects here before any weight is read.
NUM_LAYERS_MAX = 4096
# The largest number of tokens per entry. A block's size is the least common multiple of both ratios.
_RATIO_MAX = 65_536
_LAYER_KINDS = {
    "sliding_attention": LayerKind.WINDOW,
    "compressed_sparse_attention": LayerKind.CSA,
    "heavily_compressed_attention": LayerKind.HCA,
}
# Defaults of DeepseekV4Config in transformers 5.23, for configs that leave a field out.
_CONFIG_DEFAULTS = {"head_dim": 512, "index_head_dim": 128, "sliding_window": 128, "num_hidden_layers": 43}
_LEGACY_RATIOS = {0: LayerKind.WINDOW, 4: LayerKind.CSA, 128: LayerKind.HCA}


def other_model_type(model_type: object) -> str:
    """The message that refuses a config of another type than `deepseek_v4`."""
    if model_type == "deepseek_v41":
        return (
            "Antefix cannot run model_type deepseek_v41; it can only store the KV that another engine computes"
            " (docs/WEIGHTS.md). Layout, records, names, restore planner, sizes and simulation are implemented."
            " Caches that layers share, the index in two levels, ratio 1, keys from main latents, single-pass mHC,"
            " Engram, vision and DSpark are not"
        )
    return f"model_type must be deepseek_v4, is {model_type!r}"


def _geometry_from_config(config: Mapping[str, Any]) -> KVGeometry:
    if config.get("model_type", "deepseek_v4") != "deepseek_v4":
        raise InvalidRequest(other_model_type(config["model_type"]))
    head_dim = _positive(config, "head_dim")
    return KVGeometry(
        layers=_layer_kinds(config),
        head_dim=head_dim,
        rope_dim=read_ropes(config, head_dim).dim,
        indexer_dim=_positive(config, "index_head_dim"),
        csa_ratio=_ratio(config, "compress_rate_csa", "compressed_sparse_attention", 4),
        hca_ratio=_ratio(config, "compress_rate_hca", "heavily_compressed_attention", 128),
        window=_positive(config, "sliding_window"),
    )


def _positive(config: Mapping[str, Any], name: str) -> int:
    value = config.get(name, _CONFIG_DEFAULTS[name])
    most = NUM_LAYERS_MAX if name == "num_hidden_layers" else COUNT_MAX
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
        raise InvalidRequest(f"config field {name} must be a positive integer up to {most}, is {shown(value)}")
    return value


def _ratio(config: Mapping[str, Any], legacy_name: str, name: str, default: int) -> int:
    """Tokens per entry. If a config has both fields, the legacy field takes precedence, as in transformers."""
    rates = config.get("compress_rates")
    rates = {} if rates is None else rates
    if not isinstance(rates, Mapping):
        raise InvalidRequest(f"config field compress_rates must be an object, is {rates!r}")
    legacy = config.get(legacy_name)
    field, value = (f"compress_rates.{name}", rates.get(name, default)) if legacy is None else (legacy_name, legacy)
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= _RATIO_MAX:
        raise InvalidRequest(f"config field {field} must be a positive integer up to {_RATIO_MAX}, is {shown(value)}")
    return value


def per_layer(field: str, given: object, num_layers: int, known: Collection[object]) -> list[Any]:
    """A config's list with one value per layer; values after the last layer are dropped.

    Raises:  InvalidRequest: it is not a list, is too short, or has an unknown value.
    """
    names = given if isinstance(given, list | tuple) else ()
    unknown = sorted({repr(name) for name in names if not isinstance(name, Hashable) or name not in known})
    if unknown or len(names) < num_layers:
        raise InvalidRequest(
            f"{field} must have {num_layers} values out of {', '.join(map(str, known))}, is {given!r:.200}; "
            f"unknown values: {unknown}"
        )
    return list(names[:num_layers])


def _layer_kinds(config: Mapping[str, Any]) -> tuple[LayerKind, ...]:
    num_layers = _positive(config, "num_hidden_layers")
    for field, kinds in (("layer_types", _LAYER_KINDS), ("compress_ratios", _LEGACY_RATIOS)):
        if (names := config.get(field)) is not None:
            return tuple(kinds[name] for name in per_layer(field, names, num_layers, kinds))
    # V4-Pro's layer plan: two HCA layers, then CSA and HCA alternate (transformers' default).
    rest = (LayerKind.CSA if i % 2 else LayerKind.HCA for i in range(max(num_layers - 2, 0)))
    return (LayerKind.HCA,) * min(num_layers, 2) + tuple(rest)
