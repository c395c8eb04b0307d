"""For any config.json our logits equal transformers', or we refuse a field by name, or a note says why they differ."""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from antefix.errors import ModelError
from antefix.model import ModelConfig, load_model
from tests.model.config_cases import BASE, Outcome, judge, our_logits, random_rope, their_logits
from tests.model.conftest import C, H, W

AGREE = 1e-9
ROPE_NAMES = ("rope_", "rotary", "factor", "beta_", "mscale", "max_position", "qk_rope_head_dim")
YARN: dict[str, Any] = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
MAIN: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25}
STRETCHED: dict[str, Any] = YARN | {"rope_theta": 160000.0, "partial_rotary_factor": 0.25}


def nested(compress: dict[str, Any], main: dict[str, Any] = MAIN) -> dict[str, Any]:
    return {"rope_parameters": {"main": main, "compress": compress}}


def without(fields: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name not in names}


def check(config: dict[str, Any], names: tuple[str, ...]) -> Outcome:
    """Check this file's rule for one config."""
    outcome = judge(config)
    if outcome.ours:
        assert any(name in outcome.ours for name in names), f"refused without its name: {outcome.ours}: {config}"
    elif outcome.notes:
        assert any(name in note for name in names for note in outcome.notes)
    elif outcome.error is not None:
        assert outcome.error < AGREE, f"silently off by {outcome.error:.2e}: {config}"
    return outcome


# Fields of DeepseekV4Config, and of older or foreign configs.
FIELDS = [
    "vocab_size", "hidden_size", "moe_intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "q_lora_rank", "num_experts_per_tok", "n_routed_experts",
    "n_shared_experts", "scoring_func", "norm_topk_prob", "routed_scaling_factor", "rope_theta", "layer_types",
    "compress_rates", "compress_rope_theta", "hc_mult", "hc_sinkhorn_iters", "hc_eps", "mlp_layer_types",
    "swiglu_limit", "sliding_window", "o_groups", "o_lora_rank", "index_n_heads", "index_head_dim", "index_topk",
    "num_nextn_predict_layers", "hidden_act", "rms_norm_eps", "bos_token_id", "eos_token_id",
    "tie_word_embeddings", "rope_parameters", "rope_scaling", "partial_rotary_factor", "attention_bias",
    "mlp_bias", "num_hash_layers", "qk_rope_head_dim", "compress_ratios", "compress_rate_csa",
    "compress_rate_hca", "intermediate_size", "num_local_experts", "is_causal", "per_layer_config", "topk_method",
    "original_max_position_embeddings", "use_sliding_window", "rope_interleave",
]  # fmt: skip


# One value of each kind: null, zero, another size, a boolean, a word. The long run adds more.
VALUES = [(None, 0, 2, True, "relu"), pytest.param((-1, 0.0, 0.5, False, []), marks=pytest.mark.long)]


@pytest.mark.slow
@pytest.mark.parametrize("values", VALUES, ids=["few", "more"])
@pytest.mark.parametrize("field", FIELDS)
def test_no_field_changes_transformers_logits_unseen(field: str, values: tuple[Any, ...]) -> None:
    for value in values:
        # The refusal may also name another field that this value makes impossible.
        check(BASE | {field: value}, (field, "n_routed_experts", "num_attention_heads", "head_dim", "RoPE"))


@pytest.mark.slow
def test_no_rope_changes_transformers_logits_unseen() -> None:
    outcomes = [check(random_rope(seed), ROPE_NAMES) for seed in range(80)]
    # The test would prove little if one side refused nearly all configs.
    assert sum(not o.theirs and not o.ours and not o.notes for o in outcomes) >= 10
    assert any(o.notes for o in outcomes) and any(o.ours and not o.theirs for o in outcomes)


def test_the_law_is_broken_by_a_reader_that_leaves_a_field_out(monkeypatch: pytest.MonkeyPatch) -> None:
    config = BASE | nested(STRETCHED | {"attention_factor": 0.7})
    check(config, ROPE_NAMES)
    monkeypatch.setattr("antefix.rope._attention_factor", lambda *_: (1.0, ()))
    with pytest.raises(AssertionError, match="silently off"):
        check(config, ROPE_NAMES)


ACCEPTED: dict[str, dict[str, Any]] = {
    "as it is": {},
    "flat yarn": {"rope_scaling": YARN},
    "flat yarn, mscale, truncate": {"rope_scaling": YARN | {"mscale": 0.7, "mscale_all_dim": 1.0, "truncate": False}},
    "flat yarn, no original length": {"rope_scaling": without(YARN, "original_max_position_embeddings")},
    "flat yarn, factor null": {"rope_scaling": YARN | {"factor": None}},
    "rope_scaling before rope_parameters": {"rope_scaling": YARN} | nested(STRETCHED | {"factor": 8.0}),
    "nested yarn": nested(STRETCHED | {"attention_factor": 1.0}),
    "nested yarn, another factor": nested(STRETCHED | {"attention_factor": 0.7, "beta_fast": None}),
    "nested yarn, both mscales": nested(STRETCHED | {"mscale": 0.7, "mscale_all_dim": 1.3}),
    "nested yarn, factor null": nested(STRETCHED | {"factor": None, "attention_factor": 1.0}),
    "nested yarn, no original length": nested(
        without(STRETCHED, "original_max_position_embeddings") | {"attention_factor": 1.0}
    ),
    "yarn on main": nested(MAIN | {"rope_theta": 500.0}, MAIN | YARN),
    "nested dims that differ from the top": {"partial_rotary_factor": 0.5} | nested(MAIN),
    "nested dims from the top": nested(*(without(MAIN, "partial_rotary_factor"),) * 2),
    "bases are equal": {"compress_rope_theta": 10000.0} | nested(without(MAIN, "rope_theta")),
    "head dims turned whole": {"index_head_dim": 32, "partial_rotary_factor": 1.0},
    "zeros": {"routed_scaling_factor": 0.0, "hc_eps": 0.0, "rms_norm_eps": 0.0, "hc_sinkhorn_iters": 0},
    "swish": {"hidden_act": "swish"},
    "no clamp": {"swiglu_limit": math.inf},
    "other names": without(BASE, "moe_intermediate_size") | {"intermediate_size": 16, "num_local_experts": 4},
    "weights that are not normed": {"norm_topk_prob": False},
    "windows, CSA": {"layer_types": [W, C, C]},
    "HCA": {"layer_types": [H, H, H]},
    "ratios of older configs": {"compress_rates": None, "compress_rate_csa": 3, "compress_rate_hca": 6},
    "no hash layers": {"num_hash_layers": 0},
    "hash layers by default": {"num_hash_layers": None},
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_what_makes_sense_is_computed_as_transformers_does(name: str) -> None:
    config = BASE | ACCEPTED[name]
    if name == "other names":
        config.pop("moe_intermediate_size")
    outcome = judge(config)
    assert (outcome.theirs, outcome.ours, outcome.notes) == ("", "", ())
    assert outcome.error is not None and outcome.error < AGREE


# Configs that transformers runs and we refuse. docs/MODEL_CONFIGS.md gives the reasons. The message must have the name.
REFUSED: dict[str, dict[str, Any]] = {
    "hidden_act": {"hidden_act": "relu"},
    "mlp_bias": {"mlp_bias": True},
    "n_shared_experts": {"n_shared_experts": 2},
    "num_key_value_heads": {"num_key_value_heads": 2},
    "swiglu_limit": {"swiglu_limit": 0.0},
    "index_topk": {"index_topk": 0},
    "scoring_func": {"scoring_func": "relu"},
    "is_causal": {"is_causal": False},
    "moe_intermediate_size": {"intermediate_size": 8},
    "partial_rotary_factor 0.16": {"partial_rotary_factor": 0.16},
    "partial_rotary_factor of main and compress": nested(MAIN | {"partial_rotary_factor": 0.5}),
    "partial_rotary_factor must be given": {"partial_rotary_factor": None, "index_head_dim": 32}
    | nested(*(without(MAIN, "partial_rotary_factor"),) * 2),
    "qk_rope_head_dim": {"qk_rope_head_dim": 16},
    "rope type of compress must be default or yarn, is 'linear'": {
        "rope_scaling": {"rope_type": "linear", "factor": 4.0}
    },
    "rope type of compress must be default or yarn, is 'dynamic'": nested(STRETCHED | {"rope_type": "dynamic"}),
    "mscale": nested(STRETCHED | {"mscale": 0.7}),
    "mscale_all_dim": nested(STRETCHED | {"mscale_all_dim": 0.7}),
    "beta_fast": {"rope_scaling": YARN | {"beta_fast": 0}},
    "rope_theta": nested(without(STRETCHED, "rope_theta")),
    "main and compress": {"rope_parameters": {"compress": STRETCHED}},
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_transformers_runs_and_we_refuse_names_the_field(name: str) -> None:
    their_logits(BASE | REFUSED[name])
    with pytest.raises(ModelError, match=name):
        ModelConfig.from_dict(BASE | REFUSED[name])


# Notes at load, each with a config that states the note's meaning explicitly. Our logits must equal transformers' of
# that config.
NOTED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "rope_parameters.compress gives no attention_factor": (
        nested(STRETCHED),
        nested(STRETCHED | {"attention_factor": 1.0}),
    ),
    "rope_scaling gives no attention_factor": (
        {"rope_scaling": YARN | {"attention_factor": None}},
        {"rope_scaling": YARN},
    ),
    "main.partial_rotary_factor is missing": (
        {"partial_rotary_factor": None, "qk_rope_head_dim": 8, "index_head_dim": 32}
        | nested(*(without(MAIN, "partial_rotary_factor"),) * 2),
        {"index_head_dim": 32} | nested(MAIN),
    ),
}


@pytest.mark.parametrize("name", NOTED)
def test_where_deepseeks_code_differs_from_transformers_it_is_said(name: str) -> None:
    given, written_out = NOTED[name]
    outcome = judge(BASE | given)
    assert name in " ".join(outcome.notes)
    assert outcome.error is not None and outcome.error > 1e-3
    weights, want = their_logits(BASE | written_out)
    got = our_logits(ModelConfig.from_dict(BASE | given), weights)
    assert float((got - want).abs().max() / want.abs().max()) < AGREE


def test_biases_that_transformers_ignores_are_ignored_and_said() -> None:
    outcome = judge(BASE | {"attention_bias": True})
    assert outcome.notes == ("attention_bias is ignored, as transformers ignores it: V4's attention has no biases",)
    assert outcome.error is not None and outcome.error < AGREE


def test_a_load_says_each_note_once(
    checkpoint: Callable[[str], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = Path(shutil.copytree(checkpoint("pro"), tmp_path / "model"))
    config = json.loads((path / "config.json").read_text())
    config["rope_parameters"]["compress"] |= YARN
    (path / "config.json").write_text(json.dumps(config))
    with caplog.at_level(logging.WARNING, "antefix.model"):
        load_model(path)
    (record,) = caplog.records
    assert "rope_parameters.compress gives no attention_factor: taken as 1.0" in record.getMessage()
