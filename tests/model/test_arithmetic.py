"""The probe's names are equal exactly if cold runs have equal bits, and the probe claims only what it measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from antefix.block import check_arithmetic
from antefix.errors import InvalidRequest
from antefix.model import arithmetic, arithmetic_cache, numerics, probe
from antefix.model.arithmetic import COLUMNS_MAX, steps_of
from antefix.model.probe_steps import numbers
from antefix.model.setup import Setup, setup_of
from tests.model.planted import shows, skip_if_harmless
from tests.model.random_models import make
from tests.waiting import AT_MOST_S

ROOT = Path(__file__).parents[2]
# Each set-up has its own process, because MKL and PyTorch read the environment only before the first product.
SETUPS: dict[str, tuple[dict[str, str], tuple[int, ...]]] = {
    "plain": ({}, (1, 2, 3, 4)),
    "another library path": ({"MKL_CBWR": "COMPATIBLE"}, (1, 2)),
    "PyTorch's plain path": ({"ATEN_CPU_CAPABILITY": "default"}, (1,)),
}
SCRIPT = """
import json, sys, torch
from antefix.layout import KVFormat
from antefix.model import probe
from tests.model.random_models import bits, make
models = [make(name, kv_format=KVFormat.FLOAT32) for name in ("plain", "three streams")]
for threads in map(int, sys.argv[1:]):
    torch.set_num_threads(threads)
    print(json.dumps([[probe(model).name, bits(model, (21, 40, 41), num_tokens=42, others=1)] for model in models]))
"""


@pytest.fixture(scope="module")
def measured() -> dict[tuple[str, int], list[list[str]]]:
    """By set-up and threads: for each model the arithmetic's name and the bits of a cold run."""
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("MKL_", "ATEN_"))}
    plain |= {"PYTHONPATH": os.pathsep.join((str(ROOT), *sys.path)), "OMP_WAIT_POLICY": "PASSIVE"}
    running = {}
    for name, (variables, threads) in SETUPS.items():
        command = [sys.executable, "-c", SCRIPT, *map(str, threads)]
        running[name] = subprocess.Popen(command, env=plain | variables, cwd=ROOT, stdout=subprocess.PIPE)
    found = {}
    for name, process in running.items():
        output, _ = process.communicate(timeout=AT_MOST_S)
        assert process.returncode == 0
        for threads, line in zip(SETUPS[name][1], output.splitlines(), strict=True):
            found[name, threads] = json.loads(line)
    return found


@pytest.fixture
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_names_are_equal_where_and_only_where_bits_are(measured: dict[tuple[str, int], list[list[str]]]) -> None:
    for one in measured.values():
        for other in measured.values():
            for (name, bits), (other_name, other_bits) in zip(one, other, strict=True):
                assert (name == other_name) is (bits == other_bits)


def test_threads_change_neither_names_nor_bits(measured: dict[tuple[str, int], list[list[str]]]) -> None:
    plain = measured["plain", 1]
    assert all(measured["plain", threads] == plain for threads in (2, 3, 4))
    assert measured["another library path", 1] != plain
    assert measured["PyTorch's plain path", 1] != plain


def test_another_rounding_is_another_name() -> None:
    model = make("plain")
    name = probe(model).name
    assert probe(model).name == name
    check_arithmetic(name)
    with pytest.MonkeyPatch.context() as patch:
        # Change one bit of one function's results.
        patch.setattr(numerics, "silu", lambda x: torch.nextafter(x * numerics.sigmoid(x), torch.tensor(9e9)))
        assert probe(model).name.split("-")[2] == name.split("-")[2]
        assert probe(model).name != name


def test_a_row_alone_that_takes_another_kernel_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numerics, "ROW_TILE", 1)
    measured = probe(make("plain"))
    assert not measured.ignores_shapes
    assert measured.failed


def padded_after_the_transpose(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(numerics, "COLUMN_TILE", 1)
    patch.setattr(numerics, "_pad_matrix", lambda b, rows, columns: F.pad(b, (0, columns, 0, rows)))


def columns_in_eights(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(numerics, "COLUMN_TILE", 8)


def columns_not_padded(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(numerics, "COLUMN_TILE", 1)


def test_a_fault_is_called_harmless_only_if_its_bits_are() -> None:
    assert shows(lambda patch: patch.setattr(numerics, "ROW_TILE", 1), make("hidden 100, 6 experts"))
    assert not shows(lambda _: None, make("hidden 100, 6 experts"), threads=3)


def test_weights_that_are_padded_after_they_were_transposed_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not probe(make("hidden 100, 6 experts")).failed
    skip_if_harmless(padded_after_the_transpose, make("hidden 100, 6 experts"))
    padded_after_the_transpose(monkeypatch)
    measured = probe(make("hidden 100, 6 experts"))
    assert any(text.startswith("100 x 6:") for text in measured.failed)
    assert not measured.ignores_shapes


def test_columns_that_threads_divide_between_them_are_seen(
    monkeypatch: pytest.MonkeyPatch, three_threads: None
) -> None:
    """Four streams need 24 columns. Three threads take eight each, and AVX2's kernel for eight sums in another order.

    AVX-512 kernels sum them in one order.
    """
    skip_if_harmless(columns_in_eights, make("plain"), threads=3)
    columns_in_eights(monkeypatch)
    assert probe(make("plain")).name.endswith("-t3")


def test_rows_of_one_column_that_threads_divide_between_them_are_seen(
    monkeypatch: pytest.MonkeyPatch, three_threads: None
) -> None:
    """One stream needs one column. Three threads divide 112 rows unevenly, and a remainder of rows sums otherwise.

    They divide the probe's 144 rows evenly, so with AVX-512 kernels only a piece shows it.
    """
    model = make("one wide stream")
    assert not probe(model).failed
    skip_if_harmless(columns_not_padded, model, threads=3)
    columns_not_padded(monkeypatch)
    measured = probe(model)
    assert measured.failed or measured.name.endswith("-t3")


def test_bits_that_depend_on_threads_are_part_of_the_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def divided(plain: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def run(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            product = plain(a, b)
            return product * (1 + 1e-6) if torch.get_num_threads() == 2 else product

        return run

    model = make("plain")
    for name in ("multiply", "multiply_each"):
        monkeypatch.setattr(numerics, name, divided(getattr(numerics, name)))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    measured = probe(model)
    torch.set_num_threads(before)
    assert measured.name.endswith("-t2")
    assert measured.ignores_shapes
    assert any("number of threads" in text for text in measured.failed)
    check_arithmetic(measured.name)


def test_pairs_that_differ_from_single_products_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decode steps of many sequences use pairs, and a chunk of one uses single products. Both must sum in one order."""
    plain = numerics.multiply_each
    monkeypatch.setattr(numerics, "multiply_each", lambda a, b: plain(a, b) * (1 + 1e-6))
    measured = probe(make("plain"))
    assert not measured.ignores_shapes
    assert all("or alone" in text for text in measured.failed)


def test_what_was_not_checked_is_said() -> None:
    measured = probe(make("plain"), time_s_max=0.0)
    assert measured.num_proved == 0
    assert len(measured.unproved) == len(list(steps_of(make("plain"))))
    model = make("plain")
    model.lm_head = torch.nn.Linear(32, COLUMNS_MAX + 21, bias=False).requires_grad_(False)
    assert any(str(COLUMNS_MAX + 21) in text for text in probe(model, time_s_max=0.0).unproved)


def test_a_cache_saves_time_and_claims_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, cache = make("plain"), str(tmp_path / "cache")
    first = probe(model, cache_dir=cache)
    again = probe(model, cache_dir=cache)
    assert (first.is_cached, again.is_cached) == (False, True)
    assert (again.name, again.num_proved) == (first.name, first.num_proved)
    # Another set-up, model or number of threads does not find this cache entry.
    setup = setup_of(model.device)
    for other in (Setup(processor="other", libraries=setup.libraries, threads=1),
                  Setup(processor=setup.processor, libraries="other", threads=1)):  # fmt: skip
        assert not probe(model, cache_dir=cache, setup=other).is_cached
    assert not probe(make("three streams"), cache_dir=cache).is_cached
    # If this machine computes other bits, the file is not believed, and the new measurement is reported.
    monkeypatch.setattr(numerics, "sigmoid", lambda x: torch.nextafter(1 / (1 + torch.exp(-x)), torch.tensor(2.0)))
    changed = probe(model, cache_dir=cache)
    assert not changed.is_cached
    assert changed.name != first.name


@pytest.mark.parametrize("damage", ["", "{}", "[]", "null", "flip", "claim"])
def test_a_damaged_cache_is_as_if_there_were_none(damage: str, tmp_path: Path) -> None:
    model = make("plain")
    probe(model, cache_dir=str(tmp_path), time_s_max=0.0)
    (file,) = tmp_path.glob("*.json")
    text = file.read_text()
    if damage == "claim":
        # The file claims that everything was proved, as a user or another version might have written it.
        data = json.loads(text)
        data["arithmetic"] |= {"num_proved": 99, "unproved": []}
        damage = json.dumps(data)
    file.write_text(text.replace("unproved", "unprowed") if damage == "flip" else damage)
    measured = probe(model, cache_dir=str(tmp_path))
    assert not measured.is_cached
    assert measured.num_proved == len(list(steps_of(model)))


def test_a_directory_that_cannot_be_written_costs_time_only(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert probe(make("plain"), cache_dir=str(tmp_path / "file" / "cache"), time_s_max=0.0).name


def test_a_cards_kind_driver_and_kernels_are_part_of_its_name() -> None:
    """A CPU stands in for the card and runs its products. The rest of the name is the card's."""
    model = make("plain")
    card = "H200 9.0, driver 1, CUDA 13, Triton 3"
    setups = [Setup(processor="", libraries="", threads=1, card=text) for text in (card, card.replace("r 1", "r 2"))]
    names = {
        probe(model, setup=setup, kernels=kernels, time_s_max=0.0).name
        for setup in setups
        for kernels in ("torch", "triton")
    }
    assert len(names | {probe(model, time_s_max=0.0).name}) == 5
    assert any("attention, index and compressor kernels" in text for text in probe(model, setup=setups[0]).unproved)


def test_the_attention_kernels_of_a_card_are_part_of_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from antefix_kernels import hopper

    model, card, names = make("plain"), Setup(processor="", libraries="", threads=1, card="H200 9.0"), set()
    monkeypatch.setattr(torch, "empty", lambda *_, **__: None)
    for has_roles in (False, True):
        monkeypatch.setattr(hopper, "available", lambda _, has_roles=has_roles: has_roles)
        names.add(arithmetic._unprobed_kernels(torch.device("cuda")))
    monkeypatch.setattr(arithmetic, "KERNELS_REVISION", arithmetic.KERNELS_REVISION + 1)
    names.add(arithmetic._unprobed_kernels(torch.device("cuda")))
    monkeypatch.undo()
    assert len(names) == 3
    found = []
    for name in names:
        monkeypatch.setattr(arithmetic, "_unprobed_kernels", lambda _, name=name: name)
        found.append(probe(model, setup=card, kernels="triton", time_s_max=0.0).name)
    assert len(set(found)) == 3


def test_on_a_card_only_what_runs_there_is_probed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("plain")
    everywhere = {step.label for step in steps_of(model)}
    monkeypatch.setattr(type(model), "device", property(lambda _: torch.device("cuda")))
    labels = {step.label for step in steps_of(model)}
    assert f"{model.config.hidden_size} x {model.config.vocab_size}" in labels & everywhere
    assert not any(label.startswith(("sinkhorn", "pairs", "sum", "pool")) for label in labels)
    for step in steps_of(model):
        assert len(step.run(numbers((16, *step.shape[1:]), 0, step.dtype), 0)) == 16


@pytest.mark.parametrize("text", ["cpu-float32-12", "cpu-float32-0123456789", "cpu-float32-0123456789-012345678g"])
def test_a_name_that_no_probe_makes_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest, match="doctor"):
        check_arithmetic(text)


def test_the_cache_knows_which_code_computed() -> None:
    setup = setup_of(torch.device("cpu"))
    key = arithmetic_cache.key(setup, "cpu-float32", "", ["1 x 1"])
    assert key == arithmetic_cache.key(setup, "cpu-float32", "", ["1 x 1"])
    assert key != arithmetic_cache.key(setup, "cpu-float32", "", ["1 x 2"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arithmetic_cache, "_code", lambda: "other")
        assert key != arithmetic_cache.key(setup, "cpu-float32", "", ["1 x 1"])
