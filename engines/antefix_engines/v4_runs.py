"""Runs one prompt through Antefix's own model and through transformers, and gets what each stored, for `v4_entries`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from antefix.errors import InvalidRequest
from antefix.layout import BlockLayout, KVFormat, KVGeometry
from antefix.model import BlockPool, WindowState, forward, load_model
from antefix.model import Sequence as ModelSequence
from antefix.model_dir import read_config
from antefix_engines.engine_store import StoreSettings
from antefix_engines.transformers.antefix_cache import AntefixCache
from antefix_engines.transformers.stored_prefix import read_prefix
from antefix_engines.v4_entries import StoredV4, of_antefix, of_transformers


def antefix_entries(model_dir: Path, tokens: Sequence[int], kv_format: KVFormat) -> StoredV4:
    """Run whole blocks of a prompt on Antefix's model. The run's pool rows and state bytes are what workers store."""
    model = load_model(model_dir, kv_format=kv_format)
    size = model.layout.block_size
    num_blocks = _whole_blocks(tokens, size)
    pool = BlockPool(model.layout, num_blocks)
    sequence = ModelSequence(pool.allocate(num_blocks), WindowState.zeros(model.layout, 0))
    prompt = np.asarray(tokens, "<u4")
    for index in range(num_blocks):
        forward(model, pool, [(sequence, prompt[index * size : (index + 1) * size])])
    blocks = [bytes(payload) for payload in pool.payloads(sequence.block_table)]
    return of_antefix(model.layout, blocks, sequence.window.to_bytes())


def transformers_entries(model_dir: Path, tokens: Sequence[int], scratch: Path) -> StoredV4:
    """Run the same prompt in transformers in float32, with a store in `scratch`, and read the entries back from that
    store.
    """
    import transformers

    model = transformers.DeepseekV4ForCausalLM.from_pretrained(str(model_dir), attn_implementation="eager").eval()
    own = BlockLayout(geometry=KVGeometry.from_config(read_config(model_dir)), kv_format=KVFormat.FLOAT32)
    num_blocks = _whole_blocks(tokens, own.block_size)
    # One more token than the blocks have, so that all blocks are stored.
    prompt = [*tokens[: num_blocks * own.block_size], 0]
    with AntefixCache(model, StoreSettings(directory=str(scratch)), block_size=own.block_size) as cache:
        cache.prefill(model, prompt)
        prefix = read_prefix(cache.kv, cache.kv.chain(prompt), num_blocks)
        layout = cache.layout
    blocks = [
        bytes(prefix.blocks[i * layout.block_bytes : (i + 1) * layout.block_bytes]) for i in range(prefix.num_blocks)
    ]
    return of_transformers(own, layout, blocks, bytes(prefix.checkpoints))


def _whole_blocks(tokens: Sequence[int], block_size: int) -> int:
    num_blocks = len(tokens) // block_size
    if not num_blocks:
        raise InvalidRequest(
            f"a prompt to compare must have at least one block of {block_size} tokens, has {len(tokens)}"
        )
    return num_blocks
