"""The manifests use flags that the roles' parsers accept, and allow the calls that the access table allows."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from antefix.config import resolve
from antefix.security.access_table import TABLE
from antefix.security.identity import Role, named_identity, role_host
from antefix_console import cli
from antefix_console.catalog import ROLES

ROOT = Path(__file__).parents[2]
KUBERNETES = ROOT / "deploy" / "kubernetes"
FILES = sorted(path for path in KUBERNETES.rglob("*.yaml") if path.name != "kustomization.yaml")
# The example's patches add the flags of Redis and the object store.
PATCHES = {path.name: path for path in (KUBERNETES / "overlays" / "example").glob("*.yaml")}
NAMES = {"store": "kvstore", "prefill": "prefill", "decode": "decode", "router": "router"}


def documents() -> Iterator[dict[str, Any]]:
    for path in FILES:
        for each in yaml.safe_load_all(path.read_text()):
            if isinstance(each, dict):
                yield each


def of_kind(*kinds: str) -> list[dict[str, Any]]:
    return [each for each in documents() if each["kind"] in kinds]


WORKLOADS = {each["metadata"]["name"].removeprefix("antefix-"): each for each in of_kind("Deployment", "StatefulSet")}


def container(name: str) -> dict[str, Any]:
    (found,) = WORKLOADS[name]["spec"]["template"]["spec"]["containers"]
    return dict(found)


def settings(argv: list[str]) -> Any:
    """The settings that the role reads from its flags, with Kubernetes' values for $(NAME)."""
    argv = [re.sub(r"\$\(POD_IP\)", "10.1.2.3", each) for each in argv]
    assert not any("$(" in each for each in argv)
    parser, _ = cli.parser_of(argv)
    parsed = parser.parse_args(argv)
    config, _run = ROLES[parsed.role].load()
    return resolve(config, parsed, {}, section=parsed.role)


def patched(name: str) -> list[str]:
    """A workload's arguments, including those that the example adds."""
    patches = {"store": "object-store.yaml", "router": "redis-router.yaml"}.get(name, "redis.yaml")
    rows = yaml.safe_load(PATCHES[patches].read_text())
    return [*container(name)["args"], *(row["value"] for row in rows if row["path"].endswith("/args/-"))]


def test_each_role_has_a_workload() -> None:
    assert set(WORKLOADS) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_flags_are_taken_by_the_roles_own_parser(name: str) -> None:
    args = patched(name)
    assert args[:2] == ["serve", NAMES[name]]
    config = settings(args)
    assert config.credentials == "/etc/antefix/credentials"
    if name in ("prefill", "decode", "router"):
        # The names are those of existing headless services, whose pods may be added, replaced and removed.
        headless = {each["metadata"]["name"] for each in of_kind("Service") if each["spec"].get("clusterIP") == "None"}
        named = [*config.stores, *getattr(config, "routers", ())]
        assert {each.split(":")[1] for each in named if each.startswith("dns:")} <= headless
        assert len(named) == (1 if name == "router" else 2)


@pytest.mark.parametrize("name", NAMES)
def test_ports_probes_and_grace_fit_the_flags(name: str) -> None:
    config, made = settings(container(name)["args"]), container(name)
    ports = {each["name"]: each["containerPort"] for each in made["ports"]}
    assert str(ports["grpc"]) == config.address.rpartition(":")[2]
    assert str(ports["metrics"]) == config.metrics_address.rpartition(":")[2]
    if name == "router":
        assert str(ports["https"]) == config.http_address.rpartition(":")[2]
        assert made["readinessProbe"]["httpGet"]["path"] == "/readyz"
    else:
        command = made["readinessProbe"]["exec"]["command"]
        parser, _ = cli.parser_of(command[1:])
        asked = parser.parse_args(command[1:])
        assert (asked.role, asked.address) == (NAMES[name], f"127.0.0.1:{ports['grpc']}")
    slept = float(made["lifecycle"]["preStop"]["exec"]["command"][1]) if "lifecycle" in made else 0.0
    patience = WORKLOADS[name]["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    assert patience >= config.grace_s + slept + 30


@pytest.mark.parametrize("name", NAMES)
def test_every_path_that_is_written_is_a_volume(name: str) -> None:
    made = container(name)
    assert made["securityContext"]["readOnlyRootFilesystem"] is True
    mounts = {each["mountPath"]: each for each in made["volumeMounts"]}
    for flag in made["args"]:
        value = flag.partition("=")[2]
        if value.startswith("/"):
            mount = next((path for path in mounts if value == path or value.startswith(path + "/")), None)
            assert mount is not None, flag
            written = flag.startswith(("--dir", "--ledger-dir", "--arithmetic-cache"))
            assert not (written and mounts[mount].get("readOnly")), flag
    volumes = {each["name"] for each in WORKLOADS[name]["spec"]["template"]["spec"]["volumes"]}
    volumes |= {each["metadata"]["name"] for each in WORKLOADS[name]["spec"].get("volumeClaimTemplates", ())}
    assert {each["name"] for each in made["volumeMounts"]} <= volumes


@pytest.mark.parametrize("name", NAMES)
def test_pods_run_without_rights(name: str) -> None:
    pod = WORKLOADS[name]["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["automountServiceAccountToken"] is False
    allowed = container(name)["securityContext"]
    assert allowed["allowPrivilegeEscalation"] is False
    assert allowed["capabilities"] == {"drop": ["ALL"]}
    assert pod["topologySpreadConstraints"]


def test_each_workload_has_a_budget_of_disruptions() -> None:
    budgets = {each["metadata"]["name"] for each in of_kind("PodDisruptionBudget")}
    assert budgets == {f"antefix-{name}" for name in NAMES}


def test_network_policies_let_in_exactly_whom_the_table_of_calls_lets_in() -> None:
    services = {"store": "KvStoreService", "prefill": "PrefillService", "decode": "DecodeService"}
    pods = {Role.ROUTER: "router", Role.PREFILL: "prefill", Role.DECODE: "decode", Role.OPERATOR: "operator"}
    wanted = {
        name: {
            pods[role] for call, row in TABLE.items() if f".{service}/" in call for role in row.roles if role in pods
        }
        for name, service in services.items()
    }
    calls_of_a_router = ("RouterService/", "UsageService/", "WindowService/")
    wanted["router"] = {"prefill", "decode", "operator"}
    rows = [row for call, row in TABLE.items() if any(f".{each}" in call for each in calls_of_a_router)]
    assert {pods[role] for row in rows for role in row.roles if role in pods} == wanted["router"]
    for policy in of_kind("NetworkPolicy"):
        name = policy["metadata"]["name"].removeprefix("antefix-")
        grpc_port = next(each["containerPort"] for each in container(name)["ports"] if each["name"] == "grpc")
        let_in: set[str] = set()
        for rule in policy["spec"]["ingress"]:
            for peer in rule["from"]:
                labels = peer.get("podSelector", {}).get("matchLabels", {})
                if labels and [each["port"] for each in rule["ports"]] == [grpc_port]:
                    let_in.add(labels["app.kubernetes.io/name"].removeprefix("antefix-"))
        assert let_in == wanted[name], name


def test_certificates_carry_the_roles() -> None:
    found = {}
    for each in of_kind("Certificate"):
        for uri in each["spec"].get("uris", ()):
            identity = named_identity(uri)
            assert identity is not None
            hosts = each["spec"]["dnsNames"]
            assert any(named_identity(host) == identity for host in hosts)
            # Clients that do not know the process's name yet check this name.
            assert identity[0] is Role.METRICS or role_host(identity[0]) in hosts
            found[each["spec"]["secretName"]] = identity[0]
    for name, role in NAMES.items():
        assert found[f"antefix-{name}-credentials"] == role


def test_each_pod_is_scraped_by_one_monitor_as_who_it_is() -> None:
    """The monitor has the pod's labels, port and certificate name, and the network policy admits the scraper."""
    (scraper,) = [
        each for each in of_kind("Certificate") if each["spec"]["secretName"] == "antefix-metrics-credentials"
    ]
    assert [named_identity(uri)[0] for uri in scraper["spec"]["uris"]] == [Role.METRICS]
    served = {each["spec"]["secretName"]: each["spec"].get("dnsNames") for each in of_kind("Certificate")}
    policies = {each["metadata"]["name"]: each["spec"] for each in of_kind("NetworkPolicy")}
    for name, workload in WORKLOADS.items():
        labels = workload["spec"]["template"]["metadata"]["labels"]
        port = next(each["containerPort"] for each in container(name)["ports"] if each["name"] == "metrics")
        wanted = [each["spec"]["selector"]["matchLabels"].items() for each in of_kind("PodMonitor")]
        assert sum(selected <= labels.items() for selected in wanted) == 1, name
        monitor = next(
            each for each in of_kind("PodMonitor") if each["spec"]["selector"]["matchLabels"].items() <= labels.items()
        )
        (scrape,) = monitor["spec"]["podMetricsEndpoints"]
        assert (scrape["port"], scrape["path"], scrape["scheme"]) == ("metrics", "/metrics", "https")
        tls = scrape["tlsConfig"]
        assert tls["serverName"] in served[f"antefix-{name}-credentials"]
        secrets = (tls["ca"]["secret"], tls["cert"]["secret"], tls["keySecret"])
        assert {each["name"] for each in secrets} == {"antefix-metrics-credentials"}
        let_in = [rule for rule in policies[f"antefix-{name}"]["ingress"] if {"port": port} in _ports(rule)]
        assert let_in, name
    # A ServiceMonitor selects Services. Workers have no Service, and a router has two and would be scraped twice.
    assert not of_kind("ServiceMonitor")
    fronts = [each["spec"]["selector"]["app.kubernetes.io/name"] for each in of_kind("Service")]
    assert "antefix-prefill" not in fronts and "antefix-decode" not in fronts and fronts.count("antefix-router") == 2


def _ports(rule: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"port": each["port"]} for each in rule["ports"]]


def test_autoscalers_watch_metrics_that_exist() -> None:
    asked = set(
        re.findall(
            r"antefix_[a-z_]+", " ".join(path.read_text() for path in (KUBERNETES / "components").rglob("*.yaml"))
        )
    )
    code = " ".join(
        (ROOT / path).read_text() for path in ("prefill/antefix_prefill/metrics.py", "decode/antefix_decode/metrics.py")
    )
    assert asked == {"antefix_prefill_waiting_prompts", "antefix_decode_waiting_requests"}
    for name in asked:
        assert f'"{name}"' in code


@pytest.mark.services
@pytest.mark.parametrize("folder", ["base", "overlays/example"])
def test_kustomize_renders_it(folder: str) -> None:
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not here")
    rendered = subprocess.run(
        ["kubectl", "kustomize", KUBERNETES / folder], capture_output=True, text=True, check=False
    )
    assert rendered.returncode == 0, rendered.stderr
    assert len(list(yaml.safe_load_all(rendered.stdout))) >= 23
