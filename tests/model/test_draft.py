"""The layer that predicts one token further: its logits, and its state however the earlier tokens were computed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from antefix.errors import BlockCorrupt, ModelError
from antefix.layout import KVFormat
from antefix.model import (
    BlockPool,
    Model,
    Sequence,
    WindowState,
    can_draft,
    draft,
    follow,
    forward,
    load_model,
    probe,
    run_tokens,
    state_bytes,
)
from antefix.model.draft import draft_logits
from tests.model import released_checkpoint as released
from tests.model.conftest import lifted

TOKENS = np.random.default_rng(5).integers(0, 64, 90).astype("<u4")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return released.write("flash", tmp_path_factory.mktemp("drafting"))


@pytest.fixture(scope="module")
def model(directory: Path) -> Model:
    return load_model(directory, drafts=True)


class Run:
    """One sequence with a draft state."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.pool = BlockPool(model.layout, 2)
        self.sequence = Sequence(self.pool.allocate(2), WindowState.zeros(model.layout, 0))

    def take(self, tokens: np.ndarray, keep: int | None = None) -> torch.Tensor:
        """Run tokens, keep some of them, and update the draft state. Returns the logits of all tokens."""
        ran = run_tokens(self.model, self.pool, [(self.sequence, tokens)], logits="all")
        count = len(tokens) if keep is None else keep
        ran.keep(0, count)
        given = torch.from_numpy(tokens[:count].astype("i8"))
        follow(self.model, self.sequence.window, given, ran.streams[:count])
        return ran.logits

    def draft_after(self, token: int) -> torch.Tensor:
        return draft_logits(self.model, [self.sequence.window], [token])[0]


def oracle_of_draft_layer(directory: Path, where: Path) -> Callable[[torch.Tensor, np.ndarray], torch.Tensor]:
    """transformers' model of one layer with the draft layer's weights. Its inputs are streams instead of embeddings."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    tensors: dict[str, torch.Tensor] = {}
    for file in directory.glob("*.safetensors"):
        tensors |= load_file(file)
    renamed = {"embed.weight": tensors["embed.weight"], "head.weight": tensors["head.weight"]}
    for name, tensor in tensors.items():
        if name.startswith("mtp.0."):
            rest = name.removeprefix("mtp.0.")
            renamed[rest if rest.startswith(("norm.", "hc_head")) else f"layers.0.{rest}"] = tensor
    own = {name: renamed.pop(name) for name in list(renamed) if name.split(".")[2:3] and name.split(".")[2] in OWN}
    where.mkdir()
    save_file(renamed, where / "model.safetensors")
    config = released.FLASH | {"num_hidden_layers": 1, "num_hash_layers": 0, "compress_ratios": [0],
                               "num_nextn_predict_layers": 0}  # fmt: skip
    (where / "config.json").write_text(json.dumps(config))
    model = transformers.DeepseekV4ForCausalLM.from_pretrained(
        where, quantization_config=transformers.FineGrainedFP8Config(dequantize=True), dtype=torch.float32,
        attn_implementation="eager", experts_implementation="eager",
    ).double().eval()  # fmt: skip

    def weight(name: str) -> torch.Tensor:
        codes = own[f"layers.0.{name}.weight"].double()
        scale = own.get(f"layers.0.{name}.scale")
        return codes if scale is None else codes * scale.double()

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight(name)

    def logits(streams: torch.Tensor, following: np.ndarray) -> torch.Tensor:
        ids = torch.from_numpy(following.astype("i8"))[None]
        embedded = tensors["embed.weight"].double()[ids[0]]
        mixed = norm(streams, "hnorm") @ weight("h_proj").T
        mixed = mixed + (norm(embedded, "enorm") @ weight("e_proj").T).unsqueeze(1)
        hook = model.model.layers[0].register_forward_pre_hook(lambda _, given: (mixed[None], *given[1:]))
        with torch.no_grad(), lifted():
            found = model(input_ids=ids).logits[0]
        hook.remove()
        return found

    return logits


OWN = ("e_proj", "h_proj", "enorm", "hnorm")


@pytest.mark.slow
def test_drafted_logits_are_those_of_the_reference(directory: Path, tmp_path: Path) -> None:
    model = load_model(directory, drafts=True, dtype=torch.float64, kv_format=KVFormat.FLOAT64, rounds_inputs=False)
    run = Run(model)
    whole = Run(model)
    ran = run_tokens(model, whole.pool, [(whole.sequence, TOKENS)])
    want = oracle_of_draft_layer(directory, tmp_path / "layer")(ran.streams[:-1], TOKENS[1:])
    # One token at a time from the start, then after a chunk that is longer than the window.
    for position in range(12):
        run.take(TOKENS[position : position + 1])
        got = run.draft_after(int(TOKENS[position + 1]))
        assert torch.allclose(got, want[position], 1e-9, 1e-9)
    run.take(TOKENS[12:60])
    for position in range(60, 70):
        got = run.draft_after(int(TOKENS[position]))
        assert torch.allclose(got, want[position - 1], 1e-9, 1e-9)
        run.take(TOKENS[position : position + 1])


@pytest.mark.parametrize("cuts", [(1,), (20, 21, 22), (40,), (5, 39)])
def test_a_draft_state_does_not_depend_on_cuts(model: Model, cuts: tuple[int, ...]) -> None:
    whole, cut = Run(model), Run(model)
    whole.take(TOKENS[:64])
    for start, stop in zip((0, *cuts), (*cuts, 64), strict=True):
        cut.take(TOKENS[start:stop])
    assert cut.sequence.window.to_bytes() == whole.sequence.window.to_bytes()


@pytest.mark.slow
def test_tokens_that_are_not_kept_leave_no_trace(model: Model) -> None:
    """Wrong drafts inside groups and at their ends change neither window state, draft state nor pool."""
    plain, drafted = Run(model), Run(model)
    for run in (plain, drafted):
        run.take(TOKENS[:60])
    for position in range(60, 70):
        token = TOKENS[position : position + 1]
        want = plain.take(token)
        drafted.draft_after(int(token[0]))
        wrong = np.array([token[0], 63 - TOKENS[position - 1]], np.uint32)
        assert torch.equal(drafted.take(wrong, keep=1)[0], want[0])
        assert drafted.sequence.window.to_bytes() == plain.sequence.window.to_bytes()
    for part in model.layout.parts:
        count = 70 // model.config.geometry.ratio(part.layer)
        assert torch.equal(drafted.pool.records(part)[0, :count], plain.pool.records(part)[0, :count])


def test_tokens_may_be_kept_one_by_one(model: Model) -> None:
    whole, steps = Run(model), Run(model)
    whole.take(TOKENS[:66])
    steps.take(TOKENS[:62])
    ran = run_tokens(model, steps.pool, [(steps.sequence, TOKENS[62:66])])
    for count in range(1, 5):
        ran.keep(0, count)
        assert steps.sequence.position == 62 + count
        given = torch.tensor([int(TOKENS[61 + count])])
        follow(model, steps.sequence.window, given, ran.streams[count - 1 : count])
    assert steps.sequence.window.to_bytes() == whole.sequence.window.to_bytes()


def test_a_state_is_read_back_with_or_without_its_draft(model: Model, directory: Path) -> None:
    run = Run(model)
    run.take(TOKENS[:40])
    window = run.sequence.window
    data = window.to_bytes()
    again = WindowState.from_bytes(model.layout, 40, data)
    assert again.to_bytes() == data
    assert can_draft(model, again)
    assert draft(model, [again], [int(TOKENS[40])]) == draft(model, [window.clone()], [int(TOKENS[40])])
    short = WindowState.from_bytes(model.layout, 40, data[: state_bytes(model.layout, 40)])
    assert not can_draft(model, short)
    assert short.to_bytes() == data[: state_bytes(model.layout, 40)]
    plain = load_model(directory)
    assert not can_draft(plain, again)
    begins_later = bytearray(data)
    begins_later[len(short.to_bytes())] = 41
    for damaged in (data[:-1], data + b"\0", data[: len(short.to_bytes()) + 8], bytes(begins_later)):
        with pytest.raises(BlockCorrupt):
            WindowState.from_bytes(model.layout, 40, damaged)
    # The bytes are a whole number of values, but not this model's number, so the next step could not use them.
    num_values = model.config.hc_mult * model.config.hidden_size
    assert WindowState.from_bytes(model.layout, 40, data, num_stream_values=num_values).to_bytes() == data
    WindowState.from_bytes(model.layout, 40, data[: len(short.to_bytes())], num_stream_values=num_values)
    for other in (data[:-4], data + bytes(4), data + data[-4 * num_values :]):
        with pytest.raises(BlockCorrupt):
            WindowState.from_bytes(model.layout, 40, other, num_stream_values=num_values)


def test_a_state_that_fell_behind_is_not_stored(model: Model) -> None:
    run = Run(model)
    run.take(TOKENS[:40])
    forward(model, run.pool, [(run.sequence, TOKENS[40:43])])
    assert not can_draft(model, run.sequence.window)
    assert len(run.sequence.window.to_bytes()) == state_bytes(model.layout, 43)
    # The next tokens begin a new draft state.
    run.take(TOKENS[43:45])
    assert can_draft(model, run.sequence.window)
    assert run.sequence.window.draft is not None
    assert run.sequence.window.draft.first == 43


def test_names_are_the_same_with_and_without_drafting(model: Model, directory: Path) -> None:
    assert probe(model).name == probe(load_model(directory)).name


def test_releases_without_such_a_layer_cannot_draft(tmp_path: Path) -> None:
    dspark = released.write("dspark", tmp_path / "dspark")
    with pytest.raises(ModelError, match="cannot draft tokens: its config has DSpark's draft modules"):
        load_model(dspark, drafts=True)
    none = released.write("flash", tmp_path / "none", num_nextn_predict_layers=0)
    with pytest.raises(ModelError, match="cannot draft tokens: its config has no layer that drafts"):
        load_model(none, drafts=True)
