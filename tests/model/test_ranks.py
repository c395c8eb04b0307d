"""A model over two and four ranks has the bits of one rank. Only rank 0 reads KV from a store."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from antefix.block import check_arithmetic
from antefix.errors import ConfigError, InternalError, InvalidRequest
from antefix.model import BlockPool, Model, Sequence, WindowState, forward, load_model, probe, replay, run_tokens
from antefix.model.backend import make_backend
from antefix.model.draft import draft_logits, follow_ran
from antefix.model.ranks import Ranks
from antefix.model.setup import setup_of
from antefix.model_dir import identify
from tests.model import released_checkpoint as released
from tests.model.rank_threads import over_ranks

# Shapes with which each of four ranks gets whole FP8 blocks.
WIDE = {
    "head_dim": 128, "o_groups": 4, "n_routed_experts": 8, "num_hidden_layers": 3, "compress_ratios": [0, 4, 128, 0],
}  # fmt: skip
TOKENS = np.random.default_rng(2).integers(0, 64, 150).astype("<u4")


def digests(model: Model) -> dict[str, str]:
    """Digests of a cold run, its KV, hits on it by checkpoint and by replay, and steps of several sequences."""
    layout = model.layout
    pool, _ = make_backend("torch", layout, 8, "cpu", lead=model.lead)

    def begin(position: int = 0) -> Sequence:
        return Sequence(pool.allocate(2), WindowState.zeros(layout, position))

    sequence = begin()
    first = forward(model, pool, [(sequence, TOKENS[:100])], logits="all")
    second = forward(model, pool, [(sequence, TOKENS[100:128])], logits="all")
    checkpoint, block = sequence.window.to_bytes(), bytes(pool.payloads(sequence.block_table[:1])[0])
    cold = forward(model, pool, [(sequence, TOKENS[128:])], logits="all")
    # Only rank 0 reads from a store, so the block lands only in rank 0's pool.
    again = begin()
    pool.landing(again.block_table[:1])[0][:] = block
    pool.note_filled(again.block_table[:1])
    again.window = WindowState.from_bytes(layout, 128, checkpoint)
    hit = forward(model, pool, [(again, TOKENS[128:])], logits="all")
    replayed = Sequence(again.block_table, WindowState.zeros(layout, 0))
    replay(model, pool, replayed, TOKENS[:70], stop=128)
    replay(model, pool, replayed, TOKENS[70:128], stop=128)
    rebuilt = replayed.window.to_bytes()
    # A second sequence of another length joins, and one of its two tokens is kept.
    other = begin()
    forward(model, pool, [(other, TOKENS[:9])])
    ran = run_tokens(model, pool, [(sequence, TOKENS[:1]), (other, TOKENS[1:3]), (again, TOKENS[:1])], logits="all")
    for number, count in ((0, 1), (1, 1), (2, 1)):
        ran.keep(number, count)
    mixed = forward(model, pool, [(other, TOKENS[5:6]), (sequence, TOKENS[6:7])])
    found = {"logits": [first, second, cold], "block": block, "checkpoint": checkpoint, "hit": [hit], "cold": [cold],
             "replay": rebuilt, "steps": [ran.logits, mixed], "end": other.window.to_bytes()}  # fmt: skip
    return {name: _digest(value) for name, value in found.items()} | {"name": probe(model).name}


def _digest(value: bytes | list[torch.Tensor]) -> str:
    data = value if isinstance(value, bytes) else b"".join(tensor.numpy().tobytes() for tensor in value)
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def held(model: Model) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())


@functools.cache
def flash(root: Path) -> tuple[Path, Model, dict[str, str]]:
    directory = released.write("flash", root / "model", **WIDE)
    alone = load_model(directory)
    return directory, alone, digests(alone)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3, 4])
def test_any_number_of_ranks_computes_the_same_bits(root: Path, size: int) -> None:
    directory, alone, want = flash(root)
    with over_ranks(size, lambda ranks: load_model(directory, ranks=ranks)) as (model, _):
        assert digests(model) == want
        # No part of this model can be divided by three, so each of three ranks holds the whole model.
        assert (held(model) < held(alone)) == (size != 3)
    assert want["hit"] == want["cold"]
    assert want["replay"] == want["checkpoint"]


@pytest.mark.slow
def test_drafts_and_what_follows_them_are_the_same_on_ranks(tmp_path: Path) -> None:
    directory = released.write("flash", tmp_path / "model", **WIDE)

    def drafted(model: Model) -> list[torch.Tensor]:
        pool, ops = make_backend("torch", model.layout, 2, "cpu", lead=model.lead)
        sequence = Sequence(pool.allocate(2), WindowState.zeros(model.layout, 0))
        ran = run_tokens(model, pool, [(sequence, TOKENS[:40])])
        ran.keep(0)
        follow_ran(model, ran, 0, sequence.window, TOKENS[:40], stop=40, ops=ops)
        found = []
        for token in (3, 9):
            found.append(draft_logits(model, [sequence.window], [token]))
            ran = run_tokens(model, pool, [(sequence, np.array([token, 5], "<u4"))], logits="all")
            for stop in (1, 2):
                ran.keep(0, stop)
                new = np.array([token, 5], "<u4")[stop - 1 : stop]
                follow_ran(model, ran, 0, sequence.window, new, stop=stop, ops=ops)
            found.append(ran.logits)
        return found

    want = drafted(load_model(directory, drafts=True))
    with over_ranks(2, lambda ranks: load_model(directory, drafts=True, ranks=ranks)) as (model, _):
        assert all(torch.equal(one, two) for one, two in zip(drafted(model), want, strict=True))


@pytest.mark.slow
def test_other_ranks_keep_nothing_that_rank_0_has_let_go(root: Path) -> None:
    directory, _, _ = flash(root)
    with over_ranks(2, lambda ranks: load_model(directory, ranks=ranks)) as (model, followers):
        digests(model)
        pool, _ = make_backend("torch", model.layout, 1, "cpu", lead=model.lead)
        sequence = Sequence(pool.allocate(1), WindowState.zeros(model.layout, 0))
        for _ in range(3):
            forward(model, pool, [(sequence, TOKENS[:3])])
    (follower,) = followers
    sizes = len(follower._pools), len(follower._sequences)
    assert sizes == (1, 1)
    # The last call's own numbers go with the next one.
    assert len(follower._calls) <= 2


def test_a_call_that_is_wrong_is_refused_before_others_are_told(root: Path) -> None:
    directory, _, _ = flash(root)
    with over_ranks(2, lambda ranks: load_model(directory, ranks=ranks)) as (model, _):
        pool, _ = make_backend("torch", model.layout, 1, "cpu", lead=model.lead)
        sequence = Sequence(pool.allocate(1), WindowState.zeros(model.layout, 0))
        with pytest.raises(InternalError, match="block table has 1"):
            forward(model, pool, [(sequence, np.zeros(129, "<u4"))])
        assert forward(model, pool, [(sequence, TOKENS[:3])]).isfinite().all()
        with pytest.raises(InternalError, match="needs pools that its lead knows"):
            forward(model, BlockPool(model.layout, 1), [(sequence, TOKENS[:3])])


def test_sizes_that_do_not_divide_are_not_split(tmp_path: Path) -> None:
    directory = released.write("flash", tmp_path / "model")
    whole, third = load_model(directory), load_model(directory, ranks=Ranks(rank=1, size=3))
    for name, tensor in whole.state_dict().items():
        assert torch.equal(third.state_dict()[name].view(torch.uint8), tensor.view(torch.uint8))


@pytest.mark.slow
@pytest.mark.parametrize("release", ["flash", "base"])
def test_shares_make_up_the_whole(tmp_path: Path, release: str) -> None:
    directory = released.write(release, tmp_path / "model", **WIDE)
    whole = load_model(directory, drafts=True).state_dict()
    parts = [load_model(directory, drafts=True, ranks=Ranks(rank=rank, size=4)).state_dict() for rank in range(4)]
    num_split = 0
    for name, tensor in whole.items():
        pieces = [part[name].view(torch.uint8) for part in parts]
        if pieces[0].shape == tensor.view(torch.uint8).shape:
            assert all(torch.equal(piece, tensor.view(torch.uint8)) for piece in pieces)
        else:
            num_split += 1
            assert torch.equal(torch.cat(pieces), tensor.view(torch.uint8))
    # In each of four layers these are split: codes and scales of wq_b and wo_a, sinks, and codes and scales of both
    # stacks of experts.
    assert num_split == 4 * (4 + 1 + 4)


def test_on_cards_the_number_of_ranks_is_part_of_the_names(root: Path) -> None:
    directory, alone, _ = flash(root)
    share = load_model(directory, ranks=Ranks(rank=0, size=2))
    card = replace(setup_of(torch.device("cpu")), card="a card")
    one, two = (probe(model, setup=card, time_s_max=0.0) for model in (alone, share))
    assert not one.name.endswith("-x2") and two.name.endswith("-x2")
    assert any("on 2 cards: probed as wholes" in text for text in two.unproved)
    assert check_arithmetic(two.name) == two.name
    prints = [identify(directory).fingerprint(alone.layout.kv_format, arithmetic=each.name) for each in (one, two)]
    assert [each.num_cards for each in prints] == [1, 2]
    assert prints[0].digest != prints[1].digest
    with pytest.raises(InvalidRequest):
        check_arithmetic(two.name.replace("-x2", "-x0"))


def test_invalid_ranks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="rank 2 is not one of 2"):
        Ranks(rank=2, size=2)
    with pytest.raises(ConfigError, match=r"torch.distributed to be initialised"):
        Ranks.of_group()
