"""Real processes serve a checkpoint in the released format with drafting: the answers are the model's own, and hit."""

import json
import shutil

import numpy as np

from antefix.layout import KVFormat
from antefix_console.bare_model import Reference
from tests.e2e.conftest import MODEL
from tests.model import released_checkpoint as released


async def test_a_released_checkpoint_is_served_with_drafting(deploy, ask, tmp_path):
    directory = released.write("flash", tmp_path / "model", vocab_size=264)
    for name in ("antefix_tokenizer.json", "tokenizer.json"):
        if (MODEL / name).is_file():
            shutil.copy(MODEL / name, directory / name)
    config = json.loads((MODEL / "config.json").read_text())
    fields = json.loads((directory / "config.json").read_text()) | {"eos_token_id": config["eos_token_id"]}
    (directory / "config.json").write_text(json.dumps(fields))
    reference = Reference(directory, KVFormat.FP8)
    prompt = np.random.default_rng(1).integers(0, 256, 300)
    longer = np.concatenate((prompt, prompt[:50]))
    async with deploy(model=directory, speculate="mtp") as deployment:
        first, _ = await ask(deployment, prompt, max_tokens=12)
        second, last = await ask(deployment, longer, max_tokens=12)
    assert first == reference.generate(prompt, 12)
    assert second == reference.generate(longer, 12)
    # Two blocks of 128 tokens, and the checkpoint after them, which includes the draft state.
    assert (last.usage.cache_hit_tokens, last.usage.restore_plan) == (256, "checkpoint")
