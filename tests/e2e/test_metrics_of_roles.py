"""Every role of a real deployment shows metrics, and a second deployment on the same data leaves its logs alone."""

import asyncio
import json
import re
import urllib.request
from pathlib import Path

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as open_metrics
from prometheus_client.parser import text_string_to_metric_families as prometheus_text

from antefix.errors import ConfigError
from antefix_console.deployment import METRICS_TARGETS_FILE, Deployment
from tests.waiting import AT_MOST_S

DEPLOY = Path(__file__).parents[2] / "deploy"
OPEN_METRICS = "application/openmetrics-text; version=1.0.0"
ROLES = {"kvstore", "prefill", "decode", "router"}


# Metrics that only other deployments show: those with a fleet router, certificates, a file of keys, or Redis.
ELSEWHERE = ("antefix_fleet_", "antefix_security_certificate_", "antefix_security_failed_reloads", "antefix_api_keys_")
ELSEWHERE += ("antefix_window_pool_forged_", "antefix_router_dropped_events")


def fetch(address, accept="text/plain"):
    request = urllib.request.Request(f"http://{address}/metrics", headers={"accept": accept})
    with urllib.request.urlopen(request, timeout=AT_MOST_S) as answer:
        return answer.read().decode()


def sum_of(families, name):
    return sum(sample.value for family in families for sample in family.samples if sample.name == name)


def names_wanted():
    """The names of all metrics in dashboards and alerts."""
    text = "".join(path.read_text() for path in (DEPLOY / "alerts.yml", *(DEPLOY / "grafana").glob("*.json")))
    return set(re.findall(r"\bantefix_[a-z_]+", text))


async def test_every_role_shows_what_it_counts_and_a_second_deployment_is_refused(deploy, ask, document):
    async with deploy(http_address="127.0.0.1:0", log_format="json") as deployment:
        for _ in range(2):
            output, last = await ask(deployment, document[:500], max_tokens=4)
        found = {}
        for process in deployment.processes:
            found[process.role] = list(prometheus_text(await asyncio.to_thread(fetch, process.metrics_address)))
            opened = list(open_metrics(await asyncio.to_thread(fetch, process.metrics_address, OPEN_METRICS)))
            # Both formats have the same metrics. OpenMetrics names counters without their ending.
            assert {family.name for family in opened} == {family.name for family in found[process.role]}
        assert set(found) == ROLES
        # 1. The metrics agree with the usage that clients were told.
        assert sum_of(found["router"], "antefix_prompt_tokens_total") == 1000
        assert sum_of(found["router"], "antefix_hit_tokens_total") == last.usage.cache_hit_tokens > 0
        assert sum_of(found["router"], "antefix_output_tokens_total") == 2 * len(output)
        assert sum_of(found["prefill"], "antefix_plan_outcomes_total") >= 1
        assert sum_of(found["kvstore"], "antefix_store_put_records_total") >= 7
        assert sum_of(found["kvstore"], "antefix_store_sync_seconds_count") >= 1
        assert sum_of(found["decode"], "antefix_decode_tokens_total") >= 6
        # 2. Dashboards and alerts name only metrics that exist.
        shown = {family.name for families in found.values() for family in families}
        endings = ("_total", "_bucket", "_sum", "_count", "")
        missing = {name for name in names_wanted() if not any(name.removesuffix(end) in shown for end in endings)}
        assert not {name for name in missing if not name.startswith(ELSEWHERE)}
        # 3. Series are bounded: no label has a value from a prompt or a hash.
        assert all(len(family.samples) < 500 for families in found.values() for family in families)
        # 4. The targets file for Prometheus names all roles.
        targets = json.loads((deployment.config.data_dir / METRICS_TARGETS_FILE).read_text())
        assert {each["labels"]["role"]: each["targets"][0] for each in targets} == {
            process.role: process.metrics_address for process in deployment.processes
        }
        # 5. Another deployment on this data is refused, and the logs of this one stay.
        logs = deployment.config.data_dir / "logs"
        before = {path.name: (path.stat().st_ino, path.read_bytes()) for path in logs.iterdir()}
        with pytest.raises(ConfigError, match="in use by another"):
            await Deployment(deployment.config).start()
        for name, (inode, text) in before.items():
            assert (logs / name).stat().st_ino == inode and (logs / name).read_bytes().startswith(text)
        assert {path.name for path in logs.iterdir()} == set(before)
        for line in (logs / deployment.one("router").log_path.name).read_text().splitlines():
            assert json.loads(line)["level"]
