"""A role that a library's crash ends under `ulimit -v` is reported with that limit, which no crash names."""

from __future__ import annotations

import asyncio
import resource
from pathlib import Path

import pytest

from antefix.errors import ConfigError
from antefix_console.deployment import Deployment, DeploymentConfig

pytestmark = pytest.mark.services
MODEL = Path(__file__).parents[2] / "models" / "antefix-tiny"
REAL = asyncio.create_subprocess_exec
LIMITED, UNLIMITED = 1500 << 20, resource.RLIM_INFINITY


async def refusal(data_dir: Path, monkeypatch: pytest.MonkeyPatch, *, ends: str, limit: int) -> str:
    """What is said of a role whose process ends so."""

    async def started(*_, env, **streams):
        return await REAL("sh", "-c", f"echo 'pthread_create failed' >&2; {ends}", **streams)

    getrlimit = resource.getrlimit
    monkeypatch.setattr(asyncio, "create_subprocess_exec", started)
    monkeypatch.setattr(
        resource, "getrlimit", lambda which: (limit, limit) if which == resource.RLIMIT_AS else getrlimit(which)
    )
    (data_dir / "logs").mkdir(parents=True)
    deployment = Deployment(DeploymentConfig(model=MODEL, data_dir=data_dir))
    try:
        with pytest.raises(ConfigError) as caught:
            await deployment.start_role("kvstore", [])
    finally:
        await deployment.stop()
    return str(caught.value)


async def test_the_limit_of_the_address_space_is_named(tmp_path, monkeypatch):
    said = await refusal(tmp_path / "data", monkeypatch, ends="kill -SEGV $$", limit=LIMITED)
    assert "ended with -11; `ulimit -v` limits its address space to 1500 MiB, which may be too little: raise it" in said
    assert said.endswith("pthread_create failed")


@pytest.mark.parametrize(("ends", "limit"), [("kill -SEGV $$", UNLIMITED), ("exit 2", LIMITED)])
async def test_no_limit_is_named_that_had_no_part(tmp_path, monkeypatch, ends, limit):
    said = await refusal(tmp_path / "data", monkeypatch, ends=ends, limit=limit)
    assert "kvstore did not start (it ended with" in said
    assert "ulimit" not in said
