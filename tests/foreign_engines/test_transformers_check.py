"""`antefix verify --engine transformers`: restored answers equal cold ones, and a planted fault is found."""

import json

import pytest
import torch

from antefix_console.cli import main
from antefix_engines.engine_store import StoreSettings
from antefix_engines.transformers import check
from antefix_engines.transformers.cache_rows import CompressedRows, FullRows
from antefix_engines.transformers.small_models import BLOCK_SIZE, SMALL, small_model
from antefix_engines.verify import CheckRequest, findings_of

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def checks_of(name, tmp_path, dtype=torch.float32):
    model = small_model(name, seed=3, dtype=dtype)
    settings = StoreSettings(directory=str(tmp_path / name), budget_bytes="1G")
    return list(check.ModelChecks(name, model, settings, block_size=BLOCK_SIZE, seed=3).run())


@pytest.mark.parametrize(
    "name", [name if name in ("llama", "qwen3") else pytest.param(name, marks=pytest.mark.slow) for name in SMALL]
)
def test_restored_equals_cold_and_planted_faults_are_seen(name, tmp_path):
    found = checks_of(name, tmp_path)
    assert not [each for each in found if not each.is_right]
    assert {each.check for each in found if not each.is_planted} >= {
        *(f"boundary {number}" for number in range(5)),
        "a fork in block 2",
        "other weights",
        "the store opened again",
        "a damaged store",
    }
    assert any(each.is_planted for each in found)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "deepseek_v4"])
def test_bfloat16_is_kept_to_the_bit(name, tmp_path):
    assert not [each for each in checks_of(name, tmp_path, torch.bfloat16) if not each.is_right]


def test_values_that_are_not_restored_are_a_failure(tmp_path, monkeypatch):
    fill = FullRows.fill

    def without_values(self, layer, blocks, checkpoints, num_tokens):
        fill(self, layer, [blocks[0], torch.zeros_like(blocks[1])], checkpoints, num_tokens)

    monkeypatch.setattr(FullRows, "fill", without_values)
    wrong = [each for each in checks_of("llama", tmp_path) if not each.is_right]
    assert "logits of block 1 differ" in wrong[0].told


@pytest.mark.slow
def test_overlap_rows_of_another_block_are_a_failure(tmp_path, monkeypatch):
    fill = CompressedRows.fill

    def shifted(self, layer, blocks, checkpoints, num_tokens):
        fill(self, layer, blocks, [rows.roll(1, 0) for rows in checkpoints], num_tokens)

    monkeypatch.setattr(CompressedRows, "fill", shifted)
    wrong = [each for each in checks_of("deepseek_v4", tmp_path) if not each.is_right]
    assert any(each.check == "boundary 1" for each in wrong)


def test_kv_that_is_rounded_is_a_failure(tmp_path, monkeypatch):
    fill = FullRows.fill

    def rounded(self, layer, blocks, checkpoints, num_tokens):
        fill(self, layer, [rows.bfloat16().float() for rows in blocks], checkpoints, num_tokens)

    monkeypatch.setattr(FullRows, "fill", rounded)
    assert any(not each.is_right for each in checks_of("qwen3", tmp_path))


@pytest.mark.slow
def test_the_command_says_what_it_found(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(check, "SMALL", {"llama": SMALL["llama"]})
    monkeypatch.setattr(check, "_DTYPES", (torch.float32,))
    arguments = ["verify", "--engine", "transformers", "--seed", "5", "--data-dir", str(tmp_path)]
    assert main([*arguments, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["ok"] and said["engine"] == "transformers" and len(said["findings"]) > 8
    monkeypatch.setattr(check.ModelChecks, "_difference", lambda *_, **__: "")
    assert main(arguments) == 1
    told = capsys.readouterr().out
    assert "failed: llama, float32, keys read as zeros: nothing differed" in told and "NOT every hit" in told


@pytest.mark.slow
def test_a_checkpoint_of_ones_own_is_checked(tmp_path):
    """`--model` accepts any model that transformers loads."""
    small_model("qwen3", seed=1).save_pretrained(tmp_path / "mine")
    request = CheckRequest(scratch=tmp_path / "scratch", seed=1, model=tmp_path / "mine")
    found = list(findings_of("transformers")(request))
    assert found and all(each.is_right for each in found) and {each.subject for each in found} == {"mine"}
