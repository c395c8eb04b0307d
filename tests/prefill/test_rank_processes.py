"""A worker of several processes computes the same as one process, shares its store, and ends when a rank ends."""

from __future__ import annotations

import os
import queue
import signal
import threading
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from antefix.errors import ConfigError
from antefix.model import Model, Sequence, WindowState, forward, load_model
from antefix.model.backend import make_backend
from antefix.model.ranks import Ranks
from antefix.store.api import Store
from antefix_console.verify.stores import EmptyStore, MemoryStore
from antefix_prefill.worker import rank_processes
from antefix_prefill.worker.engine import Engine, EngineConfig, build_engine
from antefix_prefill.worker.rank_processes import RankProcesses
from tests.model import released_checkpoint as released
from tests.model.test_ranks import TOKENS, WIDE, digests
from tests.prefill.test_run_prompt import run, same
from tests.waiting import AT_MOST_S

MODEL = Path(__file__).parents[2] / "models" / "antefix-tiny"
DOCUMENT = np.random.default_rng(7).integers(0, 256, 300)


class Lost:
    """Records the call of `on_lost`."""

    def __init__(self) -> None:
        self.reason = ""
        self.told = threading.Event()

    def __call__(self, reason: str) -> None:
        self.reason = reason
        self.told.set()


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return released.write("flash", tmp_path_factory.mktemp("model"), **WIDE)


@pytest.fixture(scope="module")
def two(directory: Path) -> Iterator[tuple[RankProcesses, Model, Lost]]:
    lost = Lost()
    ranks = RankProcesses(2, threads=1, on_lost=lost)
    yield ranks, ranks.load(load_model, path=directory), lost
    ranks.close()


@pytest.mark.services
def test_two_processes_compute_what_one_does(directory: Path, two: tuple[RankProcesses, Model, Lost]) -> None:
    ranks, model, lost = two
    # A supervisor that stops a worker also signals its ranks, but rank 0 decides when the others end.
    os.kill(ranks.pids[0], signal.SIGTERM)
    assert digests(model) == digests(load_model(directory))
    assert model.ranks is not None and 0 < model.ranks.time.share < 1
    assert not lost.told.is_set()


@pytest.mark.services
def test_a_rank_that_dies_is_told_at_once_and_by_name(two: tuple[RankProcesses, Model, Lost]) -> None:
    ranks, model, lost = two
    pool, _ = make_backend("torch", model.layout, 1, "cpu", lead=model.lead)
    sequence = Sequence(pool.allocate(1), WindowState.zeros(model.layout, 0))
    os.kill(ranks.pids[0], signal.SIGKILL)
    assert lost.told.wait(AT_MOST_S)
    assert lost.reason == f"rank 1 (pid {ranks.pids[0]}) died with status -9"
    with pytest.raises((RuntimeError, OSError)):
        forward(model, pool, [(sequence, TOKENS[:3])])


def fail_elsewhere(*, ranks: Ranks, device: str, path: Path) -> Model:
    """A load that succeeds on rank 0 and fails on all others."""
    if ranks.rank:
        raise ConfigError("no room on this card")
    return load_model(path, ranks=ranks, device=device)


@pytest.mark.services
def test_four_processes_and_one_that_fails_to_load_or_never_answers(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rank_processes, "END_S", 0.5)
    lost = Lost()
    ranks = RankProcesses(4, threads=1, timeout_s=AT_MOST_S, on_lost=lost)
    try:
        model = ranks.load(load_model, path=directory)
        assert digests(model) == digests(load_model(directory))
        # A stopped rank does not answer. The others wait only for their time limit, which is shorter from here on.
        group = model.ranks.group  # type: ignore[union-attr]
        assert group.options._timeout == timedelta(seconds=AT_MOST_S)  # type: ignore[union-attr]
        group._set_default_timeout(timedelta(seconds=2))  # type: ignore[union-attr]
        pool, _ = make_backend("torch", model.layout, 1, "cpu", lead=model.lead)
        sequence = Sequence(pool.allocate(1), WindowState.zeros(model.layout, 0))
        os.kill(ranks.pids[2], signal.SIGSTOP)
        with pytest.raises(RuntimeError):
            forward(model, pool, [(sequence, TOKENS[:3])])
        assert lost.told.wait(AT_MOST_S)
    finally:
        ranks.close()
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks.pids)


def fail_on_tokens(*, ranks: Ranks | None, device: str, path: Path) -> Model:
    """A model whose second layer fails for token 13 on every rank, and for token 14 only on rank 1."""
    model = load_model(path, ranks=ranks, device=device)
    layer = model.model.layers[1].mlp
    plain = layer.forward

    def forward(x: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        if (tokens == 13).any() or (ranks is not None and ranks.rank == 1 and (tokens == 14).any()):
            raise ArithmeticError("no such product")
        found: torch.Tensor = plain(x, tokens)
        return found

    layer.forward = forward  # type: ignore[method-assign]
    return model


@pytest.mark.services
def test_a_call_that_fails_on_every_rank_fails_alone(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def after_failing(model: Model) -> torch.Tensor:
        pool, _ = make_backend("torch", model.layout, 2, "cpu", lead=model.lead)
        one, two = (Sequence(pool.allocate(1), WindowState.zeros(model.layout, 0)) for _ in range(2))
        forward(model, pool, [(one, TOKENS[:5] % 13)])
        for _ in range(2):
            with pytest.raises(ArithmeticError, match="no such product"):
                forward(model, pool, [(one, np.array([13], "<u4")), (two, TOKENS[:2] % 13)])
        return forward(model, pool, [(two, TOKENS[:3] % 13), (one, TOKENS[3:4] % 13)])

    lost = Lost()
    monkeypatch.setattr(rank_processes, "FAILED_S", AT_MOST_S)
    ranks = RankProcesses(2, threads=1, on_lost=lost)
    try:
        model = ranks.load(fail_on_tokens, path=directory)
        want = after_failing(fail_on_tokens(ranks=None, device="cpu", path=directory))
        assert torch.equal(after_failing(model), want)
        assert not lost.told.is_set()
        # A failure on only one rank ends all ranks.
        monkeypatch.setattr(rank_processes, "FAILED_S", 0.5)
        pool, _ = make_backend("torch", model.layout, 1, "cpu", lead=model.lead)
        sequence = Sequence(pool.allocate(1), WindowState.zeros(model.layout, 0))
        with pytest.raises(RuntimeError):
            forward(model, pool, [(sequence, np.array([14], "<u4"))])
        assert lost.told.wait(AT_MOST_S) and "rank 1" in lost.reason and "no such product" in lost.reason
    finally:
        ranks.close()


@pytest.mark.services
def test_a_rank_that_cannot_load_says_why(directory: Path) -> None:
    lost = Lost()
    ranks = RankProcesses(2, threads=1, on_lost=lost)
    try:
        with pytest.raises(ConfigError, match="rank 1 failed: ConfigError: no room on this card"):
            ranks.load(fail_elsewhere, path=directory)
    finally:
        ranks.close()


@pytest.mark.services
async def test_workers_of_one_and_two_ranks_share_a_store(tmp_path: Path, make_prompt) -> None:  # type: ignore[no-untyped-def]
    secret = tmp_path / "secret"
    secret.write_text("00" * 32)
    secret.chmod(0o600)
    store = MemoryStore()

    def build(size: int, strategy: str, where: Store) -> Engine:
        config = EngineConfig(
            model=str(MODEL), secret_file=str(secret), tensor_parallel_size=size, strategy=strategy, threads=1,
            pool_bytes=1 << 24, arithmetic_cache=str(tmp_path / "arithmetic"),
        )  # fmt: skip
        return build_engine(config, where)

    alone = build(1, "boundary", store)
    both = build(2, "boundary", store)
    try:
        assert both.fingerprint == alone.fingerprint
        longer = np.concatenate((DOCUMENT, DOCUMENT[:40]))
        cold = build(1, "boundary", EmptyStore())
        want = await run(cold, make_prompt(cold, longer))
        # 1. One rank reads the records of two ranks, by checkpoint.
        first = await run(both, make_prompt(both, DOCUMENT))
        hit = await run(alone, make_prompt(alone, longer))
        assert hit[0].report.plan == "checkpoint" and same(hit, want)
        # 2. Two ranks read the records of one rank. They do not share memory, so KV comes from the store.
        other, again = DOCUMENT[::-1].copy(), np.concatenate((DOCUMENT[::-1], DOCUMENT[:40]))
        await run(alone, make_prompt(alone, other))
        hit = await run(both, make_prompt(both, again))
        want = await run(cold, make_prompt(cold, again))
        assert hit[0].report.hit_store_tokens > 0 and same(hit, want)
        assert first[0].report.plan == "cold"
    finally:
        for engine in (alone, both):
            await engine.close()


@pytest.mark.parametrize(
    ("device", "said"),
    [("cuda", "needs as many cards"), ("cuda:1", "--device cuda, not cuda:1")],
)
def test_too_few_cards_are_refused_before_anything_starts(device: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        RankProcesses(17, device=device)


def test_an_invalid_number_of_ranks_is_refused() -> None:
    with pytest.raises(ConfigError, match="tensor_parallel_size must be 1 to 64, is 0"):
        EngineConfig(model="m", secret_file="s", tensor_parallel_size=0)


def test_a_rank_whose_message_cannot_be_read_is_lost_and_not_waited_for() -> None:
    def fail() -> None:
        raise AttributeError("no such class")

    answers: queue.SimpleQueue[object] = queue.SimpleQueue()
    lost: list[str] = []
    connections = [SimpleNamespace(recv=fail)]
    ranks = SimpleNamespace(_connections=connections, _answers=[answers], _is_closing=False, _processes=[None])
    ranks._lose = lost.append
    RankProcesses._watch(ranks, 1)  # type: ignore[arg-type]
    assert lost == ["rank 1 sent what cannot be read: AttributeError: no such class"]
    assert answers.get(timeout=1).text == lost[0]  # type: ignore[attr-defined]
