"""The answers that `antefix verify` compares with come from transformers. Run as a program, this file writes them."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from antefix.layout import KVFormat
from antefix.model import save_model
from antefix_console.verify.known_answers import BOUND, FILE, prompt_of_answer
from antefix_console.verify.models import PLANS, config_of, random_subject

os.environ.setdefault("HF_HUB_OFFLINE", "1")
pytestmark = pytest.mark.slow


def answer_of(plan: str, directory: Path) -> np.ndarray:
    """transformers' logits [V] of the last token, in float64."""
    transformers: Any = pytest.importorskip("transformers")
    subject = random_subject(plan, KVFormat.FLOAT32)
    save_model(subject.model, directory, config=config_of(plan))
    config = transformers.DeepseekV4Config.from_pretrained(directory)
    config._attn_implementation = config._experts_implementation = "eager"
    model = transformers.DeepseekV4ForCausalLM.from_pretrained(directory, config=config, dtype=torch.float64).eval()
    tokens = prompt_of_answer(subject.block_size, subject.identity.vocab_size)
    with torch.inference_mode():
        logits = model(torch.from_numpy(tokens.astype("i8"))[None], use_cache=False).logits
    return logits[0, -1].numpy()


@pytest.mark.parametrize("plan", PLANS)
def test_known_answers_are_transformers_answers(plan: str, tmp_path: Path) -> None:
    known = np.array(json.loads(FILE.read_text())[plan])
    answer = answer_of(plan, tmp_path)
    assert np.abs(known - answer).max() < BOUND / 100 * np.abs(answer).max()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        found = {plan: [round(float(x), 6) for x in answer_of(plan, Path(scratch) / plan)] for plan in PLANS}
    FILE.write_text("{\n" + ",\n".join(f'"{plan}": {json.dumps(row)}' for plan, row in found.items()) + "\n}\n")
