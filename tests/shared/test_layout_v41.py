"""DeepSeek-V4.1's layout: published sizes, layers that share caches, names, plans, simulation, and refusals."""

import copy

import numpy as np
import pytest

from antefix.block import Family, Fingerprint
from antefix.errors import InvalidRequest, ModelError
from antefix.layout_v41 import LayerRole, V41Geometry, V41Layout, V41PartKind

# The released config's fields that decide KV: 40 layers, and three draft modules after them.
CONFIG = {
    "model_type": "deepseek_v41",
    "architectures": ["DeepseekV41ForCausalLM"],
    "text_config": {
        "num_hidden_layers": 40,
        "compress_ratios": [0, 0, *[2] * 18, *[1] * 20, 0, 0, 0],
        "kv_source_layer_ids": [2, 8, 14, 20],
        "index_source_layer_ids": [2, 8, 14, 20, 24, 28, 32, 36],
        "head_dim": 512,
        "qk_rope_head_dim": 64,
        "index_head_dim": 128,
        "sliding_window": 128,
    },
}
GEOMETRY = V41Geometry.from_config(CONFIG)
LAYOUT = V41Layout(geometry=GEOMETRY)


def changed(**fields):
    config = copy.deepcopy(CONFIG)
    config["text_config"] |= fields
    return config


def test_v41_has_the_published_sizes():
    assert LAYOUT.bytes_per_token == 890
    assert {part.kind: part.record.nbytes for part in LAYOUT.parts} == {V41PartKind.MAIN: 288, V41PartKind.KEYS: 68}
    # Per token 720 bytes of main entries and 170 of keys, from three sources of ratio 2 and one of ratio 1.
    main = sum(part.nbytes for part in LAYOUT.parts if part.kind is V41PartKind.MAIN)
    assert (main / 128, LAYOUT.block_bytes / 128 - main / 128) == (720, 170)
    # Window KV of 40 layers as in V4, and the overlap rows of three sources.
    assert LAYOUT.checkpoint_bytes == 40 * 128 * 584 + 3 * 2 * 2 * 512 * 4


def test_parts_fill_the_block_in_order():
    assert [(part.layer, str(part.kind), part.num_rows) for part in LAYOUT.parts] == [
        (layer, kind, 128 if layer == 20 else 64) for layer in (2, 8, 14, 20) for kind in ("v41_main", "v41_keys")
    ]
    offset = 0
    for part in LAYOUT.parts:
        assert part.offset == offset
        assert sum(field.nbytes for field in part.record.fields) == part.record.nbytes
        offset += part.nbytes
    assert offset == LAYOUT.block_bytes


def test_layers_read_the_cache_of_the_source_before_them():
    assert [GEOMETRY.source(layer) for layer in (0, 1, 2, 7, 8, 13, 14, 19, 20, 39)] == [
        None, None, 2, 2, 8, 8, 14, 14, 20, 20,
    ]  # fmt: skip
    roles = [GEOMETRY.role(layer) for layer in range(40)]
    assert roles[:3] == [LayerRole.WINDOW, LayerRole.WINDOW, LayerRole.FULL]
    assert [layer for layer, role in enumerate(roles) if role is LayerRole.FULL] == [2, 8, 14, 20]
    assert [layer for layer, role in enumerate(roles) if role is LayerRole.REINDEX] == [24, 28, 32, 36]
    assert GEOMETRY.overlap_sources == (2, 8, 14)


def reach_by_tracing(geometry: V41Geometry) -> list[int]:
    """For each layer, the number of last tokens whose inputs affect the final state, traced token by token."""
    length = geometry.window * geometry.num_layers + 8
    needed = [set() for _ in range(geometry.num_layers)]
    wanted_above: set[int] = set()
    for layer in reversed(range(geometry.num_layers)):
        own = set(range(length - geometry.window, length))
        if layer in geometry.overlap_sources:
            own |= set(range(length - geometry.ratios[layer], length))
        # The output at token t needs the inputs of its window. Global KV is already stored.
        for token in wanted_above:
            own |= set(range(max(token - geometry.window + 1, 0), token + 1))
        needed[layer] = wanted_above = own
    return [length - min(tokens) for tokens in needed]


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"sliding_window": 3, "num_hidden_layers": 8},
        {"sliding_window": 1, "num_hidden_layers": 24},
        {"num_hidden_layers": 4, "kv_source_layer_ids": [2], "index_source_layer_ids": [2], "sliding_window": 5,
         "compress_ratios": [0, 0, 8, 8]},
    ],
)  # fmt: skip
def test_the_reach_of_exact_replays_is_that_of_a_dependency_trace(fields):
    config = changed(**fields)
    layers = config["text_config"]["num_hidden_layers"]
    for name in ("kv_source_layer_ids", "index_source_layer_ids"):
        config["text_config"][name] = [layer for layer in config["text_config"][name] if layer < layers]
    geometry = V41Geometry.from_config(config)
    assert list(geometry.replay_reach) == reach_by_tracing(geometry)


def test_names_tell_v41_from_v4_and_geometries_from_each_other():
    digests = {
        V41Geometry.from_config(changed(**fields)).digest()
        for fields in ({}, {"sliding_window": 64}, {"index_source_layer_ids": [2, 8, 14, 20]})
    }
    assert len(digests) == 3
    # The bytes of names must never change.
    assert GEOMETRY.digest().hex() == "7b877e2cce4a40d40005ec11d148c6ed"

    def named(family):
        return Fingerprint(weights_revision="w", geometry=GEOMETRY, kv_format="fp4", tokenizer="t", family=family)

    assert named(Family.V41).digest != named(Family.V4).digest
    assert named(Family.V41).labels.family == 2


def test_the_planner_weighs_v41s_own_bounded_replay():
    from antefix.window import PlanKind, Rates, RestorePlanner, Sizes, StoredPrefix

    sizes = Sizes.of(LAYOUT)
    assert (sizes.block_bytes, sizes.replay_tokens, sizes.window_tokens) == (113_920, 5_120, 128)
    planner = RestorePlanner(sizes, Rates())
    stored = StoredPrefix(num_tokens=100_000, num_blocks=700, bounded_windows=1)
    kinds = {plan.kind: plan for plan in planner.plan(stored).plans}
    assert kinds[PlanKind.BOUNDED].replay_tokens == GEOMETRY.bounded_tokens == 128
    assert kinds[PlanKind.REPLAY].replay_tokens == 5_120
    assert kinds[PlanKind.BOUNDED].load_bytes == 700 * 113_920


def test_the_simulator_knows_v41(tmp_path):
    import json

    from antefix_simulate.machine import RATE_CARDS, model_sizes

    assert model_sizes("v4.1-flash").block_bytes == 113_920
    assert "v4.1-flash" in RATE_CARDS
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    assert model_sizes(str(tmp_path)) == model_sizes("v4.1-flash")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"compress_ratios": [0, 0]}, "compress_ratios must give 40 numbers, gives 2"),
        ({"compress_ratios": "2"}, "compress_ratios must be a list"),
        ({"kv_source_layer_ids": [8, 2, 14, 20]}, "kv_source_layer_ids must name layers in ascending order"),
        ({"kv_source_layer_ids": [2, 8, 14, 40]}, "kv_source_layer_ids must name layers"),
        ({"kv_source_layer_ids": [2, 8, 14]}, "layer 20 reads a cache of ratio 1, but the KV source before it"),
        ({"kv_source_layer_ids": [8, 14, 20]}, "layer 2 reads a cache of ratio 2"),
        ({"index_source_layer_ids": [2, 8, 14]}, "must have all of kv_source_layer_ids"),
        ({"index_source_layer_ids": [0, 2, 8, 14, 20]}, "layer 0 has compress ratio 0 and cannot be a source"),
        ({"head_dim": 500}, "head_dim must be a multiple of 16"),
        ({"sliding_window": 0}, "sliding_window must be a positive integer"),
        ({"head_dim": True}, "head_dim must be a positive integer"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused_by_its_field(fields, message):
    with pytest.raises(InvalidRequest, match=message):
        V41Geometry.from_config(changed(**fields))


def test_another_model_type_is_refused():
    with pytest.raises(InvalidRequest, match="model_type must be deepseek_v41, is 'deepseek_v4'"):
        V41Geometry.from_config(CONFIG | {"model_type": "deepseek_v4"})


def test_loading_is_refused_and_says_what_there_is(tmp_path):
    import json

    from antefix.model import load_model
    from antefix.model_dir import identify

    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "model.safetensors").write_bytes(b"")
    for refused in (load_model, identify):
        with pytest.raises((ModelError, InvalidRequest), match=r"cannot run model_type deepseek_v41.*Layout, .*Engram"):
            refused(tmp_path)


def test_a_store_keeps_v41s_blocks_and_checkpoints(tmp_path):
    """The layout is registered unchanged, compressed by its own planes, and read back with equal bytes."""
    from antefix.record import RecordKind
    from antefix.store_files.codec import plan_of_block, plan_of_checkpoint
    from antefix_kvstore.kvstore_config import KvStoreConfig
    from antefix_kvstore.storage_engine import StorageEngine
    from tests.kvstore.small_store import BLOCK, Prompt

    class Drawn(Prompt):
        """A prompt whose payloads have narrow histograms, like rounded KV."""

        def payload(self, index, kind=RecordKind.BLOCK):
            nbytes = LAYOUT.block_bytes if kind is RecordKind.BLOCK else LAYOUT.checkpoint_bytes
            drawn = np.random.default_rng(index + 10 * int(kind)).normal(128, 9, nbytes)
            return np.clip(drawn, 0, 255).astype(np.uint8).tobytes()

    name = Fingerprint(weights_revision="w", geometry=GEOMETRY, kv_format="fp4", tokenizer="t", family=Family.V41)
    prompt = Drawn([1] * BLOCK * 2, payload_bytes=LAYOUT.block_bytes, fingerprint=name.digest)
    store = StorageEngine(KvStoreConfig(dir=str(tmp_path), budget_bytes=512 << 20, compression="zstd"))
    plans = {RecordKind.BLOCK: plan_of_block(LAYOUT), RecordKind.CHECKPOINT: plan_of_checkpoint(LAYOUT)}
    assert plans[RecordKind.BLOCK].payload_bytes == LAYOUT.block_bytes
    assert plans[RecordKind.CHECKPOINT].payload_bytes == LAYOUT.checkpoint_bytes
    store.register(name.digest, BLOCK, plans)
    store.put([*prompt.blocks(), prompt.checkpoint(1)])
    assert prompt.check(store) == 2
    assert store.counters.bytes_written < 0.9 * store.counters.payload_bytes_written
    store.close()
