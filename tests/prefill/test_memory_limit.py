"""A pool that exceeds its control group's memory is reported at the start. Later the system would only kill."""

import logging

import pytest

from antefix_prefill.worker import engine
from antefix_prefill.worker.engine import EngineConfig


@pytest.mark.parametrize(("limit", "told"), [(1 << 20, True), (1 << 40, False), (None, False)])
def test_a_pool_beyond_the_limit_is_told_of(monkeypatch, caplog, limit, told):
    monkeypatch.setattr(engine, "memory_limit_bytes", lambda: limit)
    with caplog.at_level(logging.WARNING):
        engine._warn_of_memory(EngineConfig(model="m", secret_file="s", pool_bytes=1 << 30))
    assert ("lower pool_bytes" in caplog.text) is told
