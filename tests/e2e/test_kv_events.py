"""Both directions at once: our deployment sends KV events, and a fleet router places requests on it by these events."""

import shutil
import tempfile
from pathlib import Path

import httpx

from antefix.secret import Keyring
from antefix_billing.ledger_files import read_settled
from antefix_router.fleet.fleet_config import FleetConfig
from antefix_router.fleet.fleet_door import PATHS, build_fleet_app
from antefix_router.fleet.fleet_router import FleetRouter
from antefix_router.gateway.access import HttpMeasures
from antefix_router.gateway.app import serve_door
from tests.waiting import AT_MOST_S, until


async def test_a_fleets_router_places_requests_on_our_workers_by_their_events(
    deploy, document, small_model, tmp_path, monkeypatch
):
    # The path must be short, because paths of Unix sockets are limited.
    sockets = Path(tempfile.mkdtemp(prefix="kv"))
    events, replay = f"ipc://{sockets}/events", f"ipc://{sockets}/replay"
    # The flags as an operator gives them to `antefix up`, for the decode worker, which holds all prompts that it
    # answers.
    monkeypatch.setenv("ANTEFIX_DECODE_KV_EVENTS", events)
    monkeypatch.setenv("ANTEFIX_DECODE_KV_EVENTS_REPLAY", replay)
    try:
        async with deploy(model=small_model, http_address="127.0.0.1:0") as deployment:
            config = FleetConfig(
                workers=(f"http://{deployment.one('router').http_address}",),
                events=(events,),
                replay=(replay,),
                http_address="127.0.0.1:0",
                secret_file=str(tmp_path / "secret"),
                ledger_dir=str(tmp_path / "ledger"),
            )
            router = FleetRouter(config, Keyring(b"0123456789abcdef"))
            await router.start()
            measures = HttpMeasures(PATHS)
            http = await serve_door(router.door, build_fleet_app(router.door, config, measures), config, measures)
            (engine,) = router.engines.engines
            async with httpx.AsyncClient(base_url=f"http://{http.address}", timeout=AT_MOST_S) as client:
                body = {"model": "any", "prompt": document.tolist(), "max_tokens": 4, "temperature": 0}
                whole_blocks = len(document) // 64 * 64
                for number in range(2):
                    answer = await client.post("/v1/completions", json=body)
                    assert answer.status_code == 200, answer.text
                    await until(lambda: len(engine.index) >= whole_blocks // 64, f"events of request {number}")
            assert engine.index.block_size == 64
            assert engine.hits.expected == whole_blocks
            assert engine.hits.reported > 0
            assert engine.hits.num_other_prompts == 0
            await http.stop()
            await router.close()
    finally:
        shutil.rmtree(sockets)
    first, second = (item.record for item in read_settled(tmp_path / "ledger"))
    assert (first.cache_hit_tokens, first.expected_hit_tokens) == (0, 0)
    assert second.cache_hit_tokens == second.expected_hit_tokens == whole_blocks
