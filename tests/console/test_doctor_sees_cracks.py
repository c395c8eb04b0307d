"""`antefix doctor` warns about set-ups and models with which a hit would differ from a cold run."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from antefix.layout import KVFormat
from antefix.model import numerics, save_model
from antefix_console.cli import main
from antefix_console.commands import doctor
from antefix_console.verify.models import config_of, random_subject
from tests.console.mutations import rows_not_padded, weights_padded_after_the_transpose
from tests.model.planted import Plant, skip_if_harmless

pytestmark = pytest.mark.slow
Ask = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def ask(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Ask]:
    """Doctor's findings about a fixed model, whose config may be changed."""
    before = torch.get_num_threads()
    monkeypatch.setattr(doctor, "_PROBE_BYTES", 1 << 20)

    def ask(plan: str, *, threads: int = 1, **changes: Any) -> list[dict[str, Any]]:
        save_model(random_subject(plan, KVFormat.FLOAT32).model, tmp_path, config=config_of(plan))
        (tmp_path / "config.json").write_text(json.dumps(config_of(plan) | changes))
        capsys.readouterr()
        main(["doctor", "--json", "--model", str(tmp_path), "--threads", str(threads), "--data-dir", str(tmp_path)])
        found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)["findings"]
        return found

    yield ask
    torch.set_num_threads(before)


def said(findings: list[dict[str, Any]], check: str, status: str) -> str:
    return "; ".join(f["detail"] for f in findings if f["check"].startswith(check) and f["status"] == status)


@pytest.mark.parametrize("plant", [rows_not_padded, weights_padded_after_the_transpose])
def test_a_row_whose_place_matters(plant: Plant, ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not said(ask("odd-sizes"), "exactness", "warn")
    if plant is not rows_not_padded:
        skip_if_harmless(plant, random_subject("odd-sizes", KVFormat.FLOAT32).model)
    plant(monkeypatch)
    assert "100 x 6: depends on a row's place" in said(ask("odd-sizes"), "exactness", "warn")


def test_a_number_of_threads_that_matters(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = numerics.multiply

    def shared_out(*args: Any, **kwargs: Any) -> torch.Tensor:
        product = plain(*args, **kwargs)
        return product * (1 + 1e-6) if torch.get_num_threads() == 3 else product

    monkeypatch.setattr(numerics, "multiply", shared_out)
    assert not said(ask("pro"), "exactness", "warn")
    findings = ask("pro", threads=3)
    assert "depends on the number of threads" in said(findings, "exactness", "warn")
    assert "-t3:" in said(findings, "arithmetic on cpu", "ok")


def test_a_config_that_others_read_otherwise(ask: Ask) -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 10000.0}
    main_rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25}
    nested = {"main": main_rope, "compress": yarn | {"partial_rotary_factor": 0.25}}
    assert "attention_factor" in said(ask("pro", rope_parameters=nested), "model", "warn")
    assert "scoring_func" in said(ask("pro", scoring_func="softmax"), "model", "fail")


def test_a_model_without_global_kv_can_be_served(ask: Ask) -> None:
    findings = ask("window-only")
    assert "tokens of KV fit" in said(findings, "model", "ok")
    assert not said(findings, "model", "fail")
