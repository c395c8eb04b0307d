"""What a worker says at its start of settings that would cost speed in silence."""

from pathlib import Path

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
