"""`antefix model check`: what it reports about model directories, and that it reads no weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from antefix.layout_v41 import V41Geometry, V41Layout
from antefix.model import load_model
from antefix.model.ranks import Ranks
from antefix_console.cli import main
from antefix_console.commands import model
from tests.model import released_checkpoint as released
from tests.shared.test_layout_v41 import CONFIG as V41


def check(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, dict[str, Any]]:
    code = main(["model", "check", *map(str, arguments), "--json"])
    return code, json.loads(capsys.readouterr().out)


@pytest.mark.slow
def test_the_released_flash_is_described_from_its_headers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The model is as large as the real one, because its tensors are holes in sparse files.

    The real index has these sums.
    """
    path = released.write_sparse(released.FULL_FLASH, tmp_path)
    code, found = check(capsys, path)
    assert code == 1
    assert found["loads"]
    assert not any(place["fits"] for place in found["places"] if place["name"] == "cpu")
    assert (found["num_files"], found["num_tensors"], found["file_bytes"]) == (46, 69_187, 159_609_485_896)
    assert found["layers"] == {"window": 2, "csa": 21, "hca": 20}
    assert found["kv"]["token"] * 128 == 449_824
    assert found["memory_bytes"]["bfloat16"] == found["file_bytes"] - found["skipped"]["mtp"]
    assert set(found["packed"]) == {"fp8 128x128 e8m0", "fp4 1x32 e8m0"}


def test_pros_config_is_read_as_it_is() -> None:
    from antefix.model import ModelConfig

    config = ModelConfig.from_dict(released.FULL_PRO)
    assert [str(kind) for kind in config.geometry.layers[:4]] == ["hca", "hca", "csa", "hca"]
    assert (config.num_layers, config.draft, config.num_draft_layers) == (61, "mtp", 1)
    later = ModelConfig.from_dict(released.FULL_FLASH | released.DSPARK | {"compress_ratios": [0] * 46})
    assert (later.num_layers, later.draft) == (43, "dspark")


@pytest.mark.parametrize("release", sorted(released.RELEASES))
def test_a_small_release_fits_here(release: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = released.write(release, tmp_path / release)
    code, found = check(capsys, path, "--pool-bytes", "1M")
    assert code == 0
    assert set(found["skipped"]) == {"dspark" if release == "dspark" else "mtp"}
    assert main(["model", "check", str(path), "--pool-bytes", "1M"]) == 0
    out = capsys.readouterr().out
    assert "would load" in out and "fits: a worker takes" in out and "no tokenizer" in out


def test_a_pool_that_does_not_fit_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, found = check(capsys, released.write("flash", tmp_path / "model"), "--pool-bytes", "900T")
    assert code == 1
    assert not found["places"][0]["fits"]


def test_why_a_directory_would_not_load_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = released.write("flash", tmp_path / "model")
    sorted(path.glob("*.safetensors"))[0].unlink()
    code, found = check(capsys, path)
    assert code == 1
    assert found == {"loads": False, "reason": found["reason"], "path": str(path)}
    assert "which is not in" in found["reason"]
    assert check(capsys, tmp_path / "nowhere")[0] == 1


def test_no_weight_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    path = released.write("flash", tmp_path / "model")
    monkeypatch.setattr("antefix.model.read_spans._read", lambda *_: pytest.fail("weights were read"))
    assert check(capsys, path)[0] == 0


def test_a_share_of_the_weights_is_what_a_rank_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wide = {"head_dim": 128, "o_groups": 4, "n_routed_experts": 8}
    path = released.write("flash", tmp_path / "model", **wide)
    _, alone = check(capsys, path)
    code, found = check(capsys, path, "--tensor-parallel-size", "4", "--pool-bytes", "1M")
    share = load_model(path, ranks=Ranks(rank=0, size=4))
    held = sum(tensor.numel() * tensor.element_size() for tensor in share.state_dict().values())
    assert code == 0 and found["num_ranks"] == 4
    assert found["memory_bytes"]["float32"] == held < alone["memory_bytes"]["float32"]
    # On a CPU all ranks share one memory.
    assert found["places"][0]["needed_bytes"] == 4 * (held + (1 << 20))
    assert main(["model", "check", str(path), "--tensor-parallel-size", "65"]) == 2


def test_what_v41_stores_is_said_though_it_does_not_load(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(V41))
    (tmp_path / "model.safetensors").write_bytes(bytes(3 << 20))
    code, found = check(capsys, tmp_path)
    assert code == 1 and not found["loads"] and "cannot run model_type deepseek_v41" in found["reason"]
    known = found["known"]
    assert (known["token"], known["block"], known["block_tokens"]) == (890, 113_920, 128)
    assert known["layers"] == {"window": 2, "full": 4, "reindex": 4, "reuse": 30}
    assert known["checkpoint"] == V41Layout(geometry=V41Geometry.from_config(V41)).checkpoint_bytes
    assert known["file_bytes"] == 3 << 20
    assert main(["model", "check", str(tmp_path)]) == 1
    assert "890 B per token" in capsys.readouterr().out
    # A config that has only the model type gives no sizes.
    (tmp_path / "config.json").write_text(json.dumps(V41 | {"text_config": {}}))
    assert "known" not in check(capsys, tmp_path)[1]


def test_sizes_have_units() -> None:
    assert model._gib(3 << 30) == "3.00 GiB"
    assert model._gib(5 << 20) == "5.00 MiB"
