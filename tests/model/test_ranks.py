"""A model over two and four processes computes what one computes, to the bit; rank 0 alone reads KV from a store."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from antefix.errors import ConfigError
from antefix.model import BlockPool, Model, Sequence, WindowState, forward, load_model, probe
from antefix.model.ranks import Ranks
from tests.model import released_checkpoint as released

# Shapes of which four ranks each get whole FP8 blocks.
WIDE = {
    "head_dim": 128, "o_groups": 4, "n_routed_experts": 8, "num_hidden_layers": 3, "compress_ratios": [0, 4, 128, 0],
}  # fmt: skip
TOKENS = np.random.default_rng(2).integers(0, 64, 150).astype("<u4")


def digests(model: Model, ranks: Ranks | None = None) -> dict[str, str]:
    """Of a cold run, of its KV, and of a hit on what rank 0 alone has kept of it."""
    pool = BlockPool(model.layout, 4)
    sequence = Sequence(pool.allocate(2), WindowState.zeros(model.layout, 0))
    first = forward(model, pool, [(sequence, TOKENS[:100])], logits="all")
    second = forward(model, pool, [(sequence, TOKENS[100:128])], logits="all")
    checkpoint, block = sequence.window.to_bytes(), bytes(pool.payloads(sequence.block_table[:1])[0])
    cold = forward(model, pool, [(sequence, TOKENS[128:])], logits="all")
    # What a store holds is rank 0's to read; other ranks get it from there.
    is_reader = ranks is None or ranks.rank == 0
    again = Sequence(pool.allocate(2), WindowState.zeros(model.layout, 0))
    pool.landing(again.block_table[:1])[0][:] = block if is_reader else bytes(len(block))
    if ranks is None:
        pool.note_filled(again.block_table[:1])
        shared = checkpoint
    else:
        ranks.share_blocks(pool, again.block_table[:1])
        shared = ranks.share(checkpoint if is_reader else None)
    again.window = WindowState.from_bytes(model.layout, 128, shared)
    hit = forward(model, pool, [(again, TOKENS[128:])], logits="all")
    found = {"logits": [first, second, cold], "block": block, "checkpoint": checkpoint, "hit": [hit], "cold": [cold]}
    return {name: _digest(value) for name, value in found.items()} | {"name": probe(model).name}


def _digest(value: bytes | list[torch.Tensor]) -> str:
    data = value if isinstance(value, bytes) else b"".join(tensor.numpy().tobytes() for tensor in value)
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def main(directory: str, rendezvous: str, rank: int, size: int) -> None:
    """One rank, in a process of its own."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=size)
    ranks = Ranks.of_group()
    model = load_model(directory, ranks=ranks)
    held = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    print(json.dumps(digests(model, ranks) | {"bytes": held}))
    torch.distributed.destroy_process_group()


@pytest.mark.services
@pytest.mark.parametrize("size", [2, 4])
def test_any_number_of_ranks_computes_the_same_bits(tmp_path: Path, size: int) -> None:
    directory = released.write("flash", tmp_path / "model", **WIDE)
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.model.test_ranks", str(directory), str(tmp_path / "meet")]
    started = [
        subprocess.Popen(
            [*command, str(rank), str(size)], stdout=subprocess.PIPE, env=environment, text=True,
        )
        for rank in range(size)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=600)[0] for process in started]
    assert [process.returncode for process in started] == [0] * size
    found = [json.loads(output.splitlines()[-1]) for output in outputs]
    alone = load_model(directory)
    want = digests(alone)
    held = sum(tensor.numel() * tensor.element_size() for tensor in alone.state_dict().values())
    assert want["hit"] == want["cold"]
    for each in found:
        share = each.pop("bytes")
        assert each == want
        assert share < held


def test_sizes_that_do_not_divide_are_not_split(tmp_path: Path) -> None:
    directory = released.write("flash", tmp_path / "model")
    whole, third = load_model(directory), load_model(directory, ranks=Ranks(rank=1, size=3))
    for name, tensor in whole.state_dict().items():
        assert torch.equal(third.state_dict()[name].view(torch.uint8), tensor.view(torch.uint8))


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
    # Of four layers wq_b and wo_a, sinks, and both stacks of experts: codes and scales.
    assert num_split == 4 * (4 + 1 + 4)


def test_ranks_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="rank 2 is not one of 2"):
        Ranks(rank=2, size=2)
    with pytest.raises(ConfigError, match=r"torch.distributed to be initialised"):
        Ranks.of_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
