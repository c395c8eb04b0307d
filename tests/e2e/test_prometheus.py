"""A real Prometheus scrapes a deployment, and promtool checks the metrics: `make test-prometheus`."""

import asyncio
import json
import shutil
import subprocess
import urllib.parse
import urllib.request
from pathlib import Path

import pytest

from antefix_console.deployment import METRICS_TARGETS_FILE
from tests.e2e.test_metrics_of_roles import ROLES, fetch
from tests.redis_servers import free_port
from tests.waiting import AT_MOST_S, until

DEPLOY = Path(__file__).parents[2] / "deploy"
ALERTS_TEST = Path(__file__).parents[1] / "telemetry" / "alerts_test.yml"

pytestmark = pytest.mark.skipif(
    not (shutil.which("prometheus") and shutil.which("promtool")),
    reason="Prometheus is not installed (Debian: apt install prometheus)",
)


def promtool(*args, **options):
    done = subprocess.run(["promtool", *args], capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def query(address, expression):
    """The value of an expression that has one sample."""
    url = f"http://{address}/api/v1/query?{urllib.parse.urlencode({'query': expression})}"
    with urllib.request.urlopen(url, timeout=AT_MOST_S) as answer:
        found = json.load(answer)["data"]["result"]
    return float(found[0]["value"][1]) if found else None


def test_the_rules_are_right_and_each_alert_fires_on_what_it_is_for():
    promtool("check", "rules", str(DEPLOY / "alerts.yml"))
    promtool("check", "config", "--syntax-only", str(DEPLOY / "prometheus.yml"))
    promtool("test", "rules", str(ALERTS_TEST))


async def test_prometheus_scrapes_a_deployment(deploy, ask, document, tmp_path):
    address = f"127.0.0.1:{free_port()}"
    async with deploy(http_address="127.0.0.1:0") as deployment:
        for process in deployment.processes:
            text = await asyncio.to_thread(fetch, process.metrics_address)
            assert promtool("check", "metrics", input=text) == ""
        config = tmp_path / "prometheus.yml"
        targets = str(deployment.config.data_dir / METRICS_TARGETS_FILE)
        given = (DEPLOY / "prometheus.yml").read_text().replace("/var/lib/antefix/metrics-targets.json", targets)
        config.write_text(given.replace("15s", "1s").replace("alerts.yml", str(DEPLOY / "alerts.yml")))
        flags = [
            f"--config.file={config}",
            f"--storage.tsdb.path={tmp_path / 'tsdb'}",
            f"--web.listen-address={address}",
        ]
        with (tmp_path / "prometheus.log").open("wb") as log:
            server = await asyncio.create_subprocess_exec("prometheus", *flags, stdout=log, stderr=log)
        try:
            for _ in range(2):
                _, last = await ask(deployment, document[:500], max_tokens=4)
            wanted = {
                'count(up{job="antefix"} == 1)': len(ROLES),
                "sum(antefix_prompt_tokens_total)": 1000,
                "sum(antefix_hit_tokens_total)": last.usage.cache_hit_tokens,
                "count(antefix_build_info)": len(ROLES),
            }
            for expression, value in wanted.items():
                await until_equal(address, expression, value)
        finally:
            server.terminate()
            await server.wait()


async def until_equal(address, expression, value):
    async def is_equal():
        found = await asyncio.to_thread(query, address, expression)
        assert found == value
        return True

    await until(is_equal, f"{expression} is {value}", despite=(OSError, AssertionError))
