"""Reads a Hugging Face model directory without its tensors: config, revisions of weights and tokenizer, fingerprint.

The router and the command-line tools name blocks with this module, so it must never need torch.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from antefix.block import CPU_FLOAT32, Fingerprint, cards_of
from antefix.checked_files import read_json
from antefix.checked_table import shown
from antefix.errors import ModelError
from antefix.layout import BlockLayout, KVFormat, KVGeometry
from antefix.rope import COUNT_MAX

CONFIG_FILE = "config.json"
# Lists the files of a sharded checkpoint. Another index file makes another model, even if all weight files are equal.
INDEX_FILE = "model.safetensors.index.json"
TOKENIZER_FILES = ("antefix_tokenizer.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
_READ_BYTES = 8 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelIdentity:
    """The parts of a model that go into block names. Two processes with equal identities may share KV."""

    path: Path
    geometry: KVGeometry
    weights_revision: str
    tokenizer_revision: str
    vocab_size: int
    max_tokens: int

    @property
    def name(self) -> str:
        return self.path.name

    def fingerprint(
        self,
        kv_format: KVFormat,
        *,
        namespace: str = "default",
        exactness: str = "exact",
        arithmetic: str = CPU_FLOAT32,
        num_cards: int | None = None,
    ) -> Fingerprint:
        """The fingerprint of this model's KV.  num_cards: None: the number is taken from the arithmetic's name."""
        return Fingerprint(
            weights_revision=self.weights_revision,
            geometry=self.geometry,
            kv_format=kv_format,
            tokenizer=self.tokenizer_revision,
            exactness=exactness,
            arithmetic=arithmetic,
            num_cards=cards_of(arithmetic) if num_cards is None else num_cards,
            namespace=namespace,
        )

    def layout(self, kv_format: KVFormat) -> BlockLayout:
        return BlockLayout(geometry=self.geometry, kv_format=kv_format)


def read_config(path: Path) -> dict[str, Any]:
    """The directory's config.json.

    Raises:  ModelError: there is no directory or no config, or the config is not a JSON object.
    """
    if not path.is_dir():
        raise ModelError(f"{path} is not a directory; a model directory has {CONFIG_FILE} and *.safetensors")
    if not (path / CONFIG_FILE).exists():
        raise ModelError(f"{path} has no {CONFIG_FILE}")
    config = read_json(path / CONFIG_FILE, "model config", error=ModelError, infinity=True)
    if not isinstance(config, dict):
        raise ModelError(f"{path / CONFIG_FILE} must hold a JSON object")
    return cast(dict[str, Any], config)


def _count(config: dict[str, Any], name: str, default: int) -> int:
    value = config.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= COUNT_MAX:
        raise ModelError(f"config field {name} must be a whole number from 1 to {COUNT_MAX}, is {shown(value)}")
    return value


def weight_files(path: Path) -> list[Path]:
    """The safetensors files in name order.

    Raises:  ModelError: there are none.
    """
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise ModelError(f"{path} has no *.safetensors")
    return files


def identify(path: str | Path, *, revision: str = "") -> ModelIdentity:
    """Read a model directory's identity; hashing the weights takes about one second per gigabyte.

    revision: used instead of a hash of the weights, for checkpoints whose revision is known from elsewhere.
    Raises:  ModelError, InvalidRequest: the model directory is not usable.
    """
    path = Path(path)
    config = read_config(path)
    geometry = KVGeometry.from_config(config)
    return ModelIdentity(
        path=path.resolve(),
        geometry=geometry,
        weights_revision=revision or hash_files(_revision_files(path)),
        tokenizer_revision=hash_files([path / name for name in TOKENIZER_FILES if (path / name).is_file()]),
        vocab_size=_count(config, "vocab_size", 129280),
        max_tokens=_count(config, "max_position_embeddings", 1048576),
    )


def _revision_files(path: Path) -> list[Path]:
    index = [path / INDEX_FILE] if (path / INDEX_FILE).is_file() else []
    return [path / CONFIG_FILE, *index, *weight_files(path)]


def hash_files(files: list[Path]) -> str:
    """BLAKE2b over names, sizes and bytes, as 32 hex digits."""
    state = hashlib.blake2b(digest_size=16, person=b"antefix-files")
    for file in files:
        state.update(f"{file.name}:{file.stat().st_size}:".encode())
        with file.open("rb") as stream:
            while piece := stream.read(_READ_BYTES):
                state.update(piece)
    return state.hexdigest()
