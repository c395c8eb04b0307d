"""At its start a worker warns about settings that would silently cost speed."""

from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from antefix.layout import KVFormat
from antefix.model import Model, ModelConfig, Sequence, WindowState
from antefix.model.backend import DECODE_STEPS, SHORT_PREFILLS, make_backend
from antefix_console.verify.models import config_of
from antefix_prefill.worker.serving import WorkerConfig, start_engine

MODEL = Path(__file__).parents[2] / "models" / "antefix-tiny"


async def test_a_store_directory_without_a_store_is_told(tmp_path, caplog):
    (tmp_path / "secret").write_text("00" * 32)
    config = WorkerConfig(
        model=str(MODEL),
        secret_file=str(tmp_path / "secret"),
        store_address="127.0.0.1:1",
        store_dir=str(tmp_path / "misspelt"),
        pool_bytes=1 << 20,
    )
    engine = await start_engine(config)
    await engine.close()
    assert f"no store in --store-dir {tmp_path / 'misspelt'}" in caplog.text


def test_a_card_shares_launches_by_default_and_records_them():
    settings = WorkerConfig(model="m", secret_file="s", store_address="h:1")
    assert (settings.decode_steps, settings.short_prefills) == (DECODE_STEPS[0], SHORT_PREFILLS[0])
    assert (settings.decode_steps, settings.short_prefills) == ("graphs", "together")
    layout = Model(ModelConfig.from_dict(config_of("pro")), kv_format=KVFormat.FP8).layout
    pytest.importorskip("triton", reason="Triton is not installed")
    with mock.patch("antefix.model.backend.uses_triton", return_value=True):
        _, ops = make_backend("auto", layout, 1, "cpu")
        runner = ops.step_runner
        assert runner is not None and runner.takes([(Sequence([0], WindowState.zeros(layout, 0)), np.zeros(100))])
        _, ops = make_backend("auto", layout, 1, "cpu", short_prefills="alone")
        assert not ops.step_runner.takes([(Sequence([0], WindowState.zeros(layout, 0)), np.zeros(100))])
