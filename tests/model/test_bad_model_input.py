"""Any fault in a checkpoint or a request gives a clear error that names it, and leaves nothing half done."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from antefix.errors import AntefixError, InternalError, InvalidRequest, ModelError
from antefix.layout import KVFormat
from antefix.model import BlockPool, Model, ModelConfig, Sequence, WindowState, forward, load_model, save_model
from antefix.model_dir import identify

Checkpoint = Callable[[str], Path]
Prompt = Callable[[int], np.ndarray]


@pytest.fixture
def directory(checkpoint: Checkpoint, tmp_path: Path) -> Path:
    """A private copy of a checkpoint, to be damaged."""
    return Path(shutil.copytree(checkpoint("pro"), tmp_path / "model"))


def edit_config(directory: Path, **changes: object) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_tensors(directory: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(directory / "model.safetensors")
    edit(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / "model.safetensors")


EXPERT = "model.layers.1.ffn.experts.2.w3.weight"
GATE = "model.layers.2.attn.indexer.compressor.wgate.weight"


@pytest.mark.parametrize("name", ["head.weight", GATE, EXPERT, "model.layers.0.ffn.gate.tid2eid"])
def test_a_missing_tensor_is_named(directory: Path, name: str) -> None:
    edit_tensors(directory, lambda tensors: tensors.pop(name))
    with pytest.raises(ModelError, match=f"tensor {name} is missing"):
        load_model(directory)


@pytest.mark.parametrize("name", ["head.weight", GATE, EXPERT])
def test_a_misshapen_tensor_is_named_with_both_shapes(directory: Path, name: str) -> None:
    edit_tensors(directory, lambda tensors: tensors.update({name: torch.zeros(3, 5)}))
    with pytest.raises(ModelError, match=rf"tensor {name} has shape \[3, 5\], the config asks for \["):
        load_model(directory)


@pytest.mark.parametrize("name", ["model.layers.1.attn.wx.weight", "model.layers.9.ffn.gate.weight", "bias"])
def test_an_unexpected_tensor_is_named(directory: Path, name: str) -> None:
    edit_tensors(directory, lambda tensors: tensors.update({name: torch.zeros(2)}))
    with pytest.raises(ModelError, match=f"unexpected tensor {name}"):
        load_model(directory)


def test_one_expert_too_many_is_unexpected(directory: Path) -> None:
    name = EXPERT.replace("experts.2", "experts.4")
    edit_tensors(directory, lambda tensors: tensors.update({name: tensors[EXPERT].clone()}))
    with pytest.raises(ModelError, match=f"unexpected tensor {name}"):
        load_model(directory)


def test_quantised_weights_are_refused(directory: Path) -> None:
    edit_tensors(directory, lambda tensors: tensors.update({"head.weight": torch.zeros(61, 32, dtype=torch.int8)}))
    with pytest.raises(ModelError, match=r"head.weight has type I8, but the config has no quantization_config"):
        load_model(directory)


def test_experts_may_come_as_one_stack(directory: Path) -> None:
    """The stack has module names, as in the shipped model."""
    before = load_model(directory).state_dict()
    names = [name for name in before if name.endswith((".experts.gate_up_proj", ".experts.down_proj"))]

    def stack(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if ".ffn.experts." in name]:
            del tensors[name]
        tensors.update({name: before[name].clone() for name in names})

    edit_tensors(directory, stack)
    after = load_model(directory).state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    edit_tensors(directory, lambda tensors: tensors.update({EXPERT: torch.zeros(24, 32)}))
    with pytest.raises(ModelError, match=f"unexpected tensor {EXPERT}"):
        load_model(directory)


def test_multi_token_prediction_layers_are_ignored(directory: Path) -> None:
    before = load_model(directory).state_dict()
    edit_tensors(directory, lambda tensors: tensors.update({"mtp.0.attn.wkv.weight": torch.zeros(2)}))
    after = load_model(directory)
    assert not after.mtp and after.state_dict().keys() == before.keys()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "model_type must be deepseek_v4, is 'llama'"),
        ({"hidden_size": -1}, "hidden_size must be a positive integer"),
        ({"hidden_size": "32"}, "hidden_size must be a positive integer"),
        ({"layer_types": ["full_attention"] * 5}, "layer_types"),
        ({"mlp_layer_types": ["moe"]}, "mlp_layer_types"),
        ({"scoring_func": "tanh"}, "scoring_func"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok"),
        ({"o_groups": 7}, "o_groups"),
        ({"quantization_config": {"quant_method": "awq"}}, "quant_method must be 'fp8', is 'awq'"),
        ({"quantization_config": {"activation_scheme": "static"}}, "activation_scheme must be 'dynamic'"),
        ({"quantization_config": {"fmt": "e5m2"}}, "fmt must be 'e4m3'"),
        ({"quantization_config": {"weight_block_size": [128]}}, "weight_block_size must be two positive integers"),
        ({"quantization_config": {"weight_block_size": [True, 1]}}, "weight_block_size must be two positive integers"),
        ({"quantization_config": "fp8"}, "quantization_config must be an object"),
        ({"quantization_config": {"quant_method": "fp8"}, "expert_dtype": "int4"}, "expert_dtype must be 'fp4' or"),
        ({"num_nextn_predict_layers": -1}, "num_nextn_predict_layers must be a non-negative integer"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope type of compress"),
        ({"swiglu_limit": 0}, "swiglu_limit must be a positive number"),
        ({"eos_token_id": [1, "x"]}, "eos_token_id"),
        ({"num_key_value_heads": 2}, "num_key_value_heads must be 1"),
        ({"sliding_window": 0}, "sliding_window"),
        ({"index_head_dim": 4}, "index_head_dim"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(directory: Path, changes: dict[str, Any], message: str) -> None:
    edit_config(directory, **changes)
    with pytest.raises(ModelError, match=message):
        load_model(directory)


@pytest.mark.parametrize("text", ["", "[]", "{", "\xff"])
def test_a_config_that_is_not_a_json_object_is_refused(directory: Path, text: str) -> None:
    (directory / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(ModelError, match=r"config\.json"):
        load_model(directory)


def test_missing_files_are_named(directory: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json"):
        load_model(tmp_path / "nowhere")
    (directory / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"neither model\.safetensors nor"):
        load_model(directory)


@pytest.mark.parametrize("keep_bytes", [0, 100, 5000])
def test_a_truncated_weights_file_is_refused(directory: Path, keep_bytes: int) -> None:
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep_bytes])
    with pytest.raises(ModelError, match=r"cannot read .*model.safetensors"):
        load_model(directory)


def sharded(checkpoint: Checkpoint, path: Path) -> Path:
    transformers = pytest.importorskip("transformers")
    transformers.DeepseekV4ForCausalLM.from_pretrained(checkpoint("pro")).save_pretrained(path, max_shard_size="40KB")
    assert len(list(path.glob("*.safetensors"))) > 2
    return path


def test_a_sharded_checkpoint_gives_the_same_weights(checkpoint: Checkpoint, tmp_path: Path) -> None:
    whole, parts = load_model(checkpoint("pro")), load_model(sharded(checkpoint, tmp_path / "sharded"))
    for name, tensor in whole.state_dict().items():
        assert torch.equal(parts.state_dict()[name], tensor)


def test_a_missing_or_emptied_shard_is_named(checkpoint: Checkpoint, tmp_path: Path) -> None:
    path = sharded(checkpoint, tmp_path / "sharded")
    shards = sorted(path.glob("*.safetensors"))
    taken = load_file(shards[1])
    save_file({"mtp.pad": torch.zeros(1)}, shards[1])
    with pytest.raises(ModelError, match="is missing") as caught:
        load_model(path)
    assert any(name in str(caught.value) for name in taken)
    shards[1].unlink()
    with pytest.raises(ModelError, match=f"names {shards[1].name}"):
        load_model(path)


def test_an_index_may_not_reach_outside_its_directory(checkpoint: Checkpoint, tmp_path: Path) -> None:
    path = sharded(checkpoint, tmp_path / "sharded")
    index = path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../other.safetensors"}}))
    (tmp_path / "other.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match="is not in"):
        load_model(path)
    index.write_text("[]")
    with pytest.raises(ModelError, match="cannot read"):
        load_model(path)


def test_saving_writes_what_transformers_saved(checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = checkpoint("pro")
    save_model(load_model(source), tmp_path / "copy", config=json.loads((source / "config.json").read_text()))
    want, got = load_file(source / "model.safetensors"), load_file(tmp_path / "copy" / "model.safetensors")
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_the_revision_names_config_and_weights(directory: Path) -> None:
    first = identify(directory).weights_revision
    assert identify(directory).weights_revision == first
    edit_config(directory, rms_norm_eps=1e-5)
    second = identify(directory).weights_revision
    edit_tensors(directory, lambda tensors: tensors["head.weight"][0, 0].add_(1))
    assert len({first, second, identify(directory).weights_revision}) == 3


def test_another_choice_of_shards_is_another_revision(checkpoint: Checkpoint, tmp_path: Path) -> None:
    path = sharded(checkpoint, tmp_path / "sharded")
    shards = sorted(path.glob("*.safetensors"))
    # A second file has the same tensors with other values. First the index names the first file, then the second.
    save_file({name: tensor + 1 for name, tensor in load_file(shards[0]).items()}, path / "other.safetensors")
    first, weights = identify(path).weights_revision, load_model(path).state_dict()
    index = path / "model.safetensors.index.json"
    index.write_text(index.read_text().replace(shards[0].name, "other.safetensors"))
    changed = load_model(path).state_dict()
    assert any(not torch.equal(changed[name], tensor) for name, tensor in weights.items())
    assert identify(path).weights_revision != first


@pytest.fixture
def running(checkpoint: Checkpoint) -> tuple[Model, BlockPool, Sequence]:
    model = load_model(checkpoint("pro"))
    pool = BlockPool(model.layout, 4)
    return model, pool, Sequence(pool.allocate(4), WindowState.zeros(model.layout, 0))


@pytest.mark.parametrize(
    ("tokens", "message", "kind"),
    [
        ([], "at least one token", InternalError),
        ([3, 61], "token id 61 is outside the vocabulary of 61", InvalidRequest),
        ([-1], r"token ids must be in \[0", InvalidRequest),
        ([2**32], r"token ids must be in \[0", InvalidRequest),
        ([1.5], "flat list of integers", InvalidRequest),
        ([[1, 2]], "flat list of integers", InvalidRequest),
        (list(range(60)) * 2, "need 8 blocks, the block table has 4", InternalError),
    ],
)
def test_bad_tokens_are_refused_and_change_nothing(
    running: tuple[Model, BlockPool, Sequence], tokens: Any, message: str, kind: type[AntefixError]
) -> None:
    model, pool, sequence = running
    with pytest.raises(kind, match=message):
        forward(model, pool, [(sequence, tokens)])
    assert sequence.position == 0
    assert not pool.rows.any()


def test_more_tokens_than_positions_are_refused(checkpoint: Checkpoint, prompt: Prompt, tmp_path: Path) -> None:
    path = Path(shutil.copytree(checkpoint("pro"), tmp_path / "short"))
    edit_config(path, max_position_embeddings=40)
    model = load_model(path)
    pool = BlockPool(model.layout, 4)
    sequence = Sequence(pool.allocate(4), WindowState.zeros(model.layout, 0))
    forward(model, pool, [(sequence, prompt(40))])
    with pytest.raises(InvalidRequest, match="41 tokens exceed the model's 40 positions"):
        forward(model, pool, [(sequence, [1])])


def test_a_batch_that_makes_no_sense_is_refused(
    running: tuple[Model, BlockPool, Sequence], checkpoint: Checkpoint
) -> None:
    model, pool, sequence = running
    with pytest.raises(InternalError, match="at least one sequence"):
        forward(model, pool, [])
    with pytest.raises(InternalError, match="only once"):
        forward(model, pool, [(sequence, [1]), (sequence, [2])])
    with pytest.raises(InternalError, match="outside the pool"):
        forward(model, pool, [(Sequence([9], sequence.window), [1])])
    other = load_model(checkpoint("pro"), kv_format=KVFormat.FLOAT32)
    with pytest.raises(InternalError, match="pool was made for another layout"):
        forward(other, pool, [(sequence, [1])])
    with pytest.raises(InternalError, match="window state was made for another layout"):
        forward(model, pool, [(Sequence([0], WindowState.zeros(other.layout, 0)), [1])])


def test_the_legacy_spellings_of_released_configs_are_read() -> None:
    config = ModelConfig.from_dict(
        {
            "model_type": "deepseek_v4",
            "num_hidden_layers": 4,
            "compress_ratios": [0, 0, 4, 128, 0],
            "num_hash_layers": 1,
            "qk_rope_head_dim": 64,
            "rope_scaling": {"type": "yarn", "factor": 16, "original_max_position_embeddings": 65536},
        }
    )
    assert [str(kind) for kind in config.geometry.layers] == ["window", "window", "csa", "hca"]
    assert config.hash_routed == (True, False, False, False)
    assert config.geometry.rope_dim == 64
    assert config.rope_main.yarn is None
    assert config.rope_compress.yarn is not None
    assert config.rope_compress.theta == 160000.0
