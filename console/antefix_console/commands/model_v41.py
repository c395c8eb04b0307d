"""The description that `antefix model check` gives of a DeepSeek-V4.1 directory. KV of a DeepSeek-V4.1 model can be
stored and simulated, but the model is not loaded.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from antefix.errors import AntefixError
from antefix.layout_v41 import MODEL_TYPE, V41Geometry, V41Layout
from antefix.model_dir import read_config


@dataclass(frozen=True, slots=True, kw_only=True)
class V41Description:
    """layers: number of layers by role.  token, block, checkpoint: bytes of KV.

    replay_tokens: tokens of an exact replay; the model's own approximate replay takes bounded_tokens.  file_bytes: size
    of the weight files as they are.
    """

    family: str
    layers: dict[str, int]
    kv_sources: tuple[int, ...]
    token: float
    block: int
    block_tokens: int
    checkpoint: int
    replay_tokens: int
    bounded_tokens: int
    num_files: int
    file_bytes: int


def describe_v41(directory: Path) -> V41Description | None:
    """Returns None for a directory of another model, or if the config turns out not to be that of V4.1."""
    try:
        config = read_config(directory)
        if config.get("model_type") != MODEL_TYPE:
            return None
        geometry = V41Geometry.from_config(config)
    except AntefixError:
        return None
    layout = V41Layout(geometry=geometry)
    roles = Counter(geometry.role(layer) for layer in range(geometry.num_layers))
    files = list(directory.glob("*.safetensors"))
    return V41Description(
        family=MODEL_TYPE,
        layers={str(role): number for role, number in roles.items()},
        kv_sources=geometry.kv_sources,
        token=layout.bytes_per_token,
        block=layout.block_bytes,
        block_tokens=layout.block_size,
        checkpoint=layout.checkpoint_bytes,
        replay_tokens=geometry.replay_tokens,
        bounded_tokens=geometry.bounded_tokens,
        num_files=len(files),
        file_bytes=sum(file.stat().st_size for file in files),
    )


def render_v41(about: V41Description) -> str:
    """The description as text."""
    layers = ", ".join(f"{number} {role}" for role, number in about.layers.items())
    sources = ", ".join(map(str, about.kv_sources))
    return "\n".join(
        (
            'What an engine that computes it would store through Antefix (docs/WEIGHTS.md, "V4.1"):',
            f"  layers      {sum(about.layers.values())}: {layers}; KV is made by {sources or 'none'}",
            f"  KV          {about.token:,.0f} B per token; blocks of {about.block_tokens} tokens, {about.block:,} B;"
            f" a checkpoint {about.checkpoint / 1e6:.2f} MB",
            f"  replays     {about.replay_tokens:,} tokens exact, {about.bounded_tokens:,} approximate",
            f"  weights     {about.num_files} files of {about.file_bytes / (1 << 30):.2f} GiB",
        )
    )
