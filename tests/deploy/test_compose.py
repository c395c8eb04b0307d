"""The compose file, unchanged, with the images of test_images.py: up, a request, a hit, down. `make test-compose`.

Runs as root in a new network namespace, because the containers share the host's network, whose ports may be in use.
COMPOSE: the program, "podman-compose" or "docker compose".
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.deploy.test_containers import OURS, services

ROOT = Path(__file__).parents[2]
COMPOSE = os.environ.get("COMPOSE", "podman-compose").split()
FILE = ROOT / "deploy" / "containers" / "compose.yaml"
NAMESPACE = "antefix-compose"
PATIENCE_S = 600.0
ASKED = {"model": "antefix-tiny", "prompt": "def fibonacci(n):\n" * 40, "max_tokens": 8, "temperature": 0}

pytestmark = [pytest.mark.images, pytest.mark.services, pytest.mark.timeout(2400)]


def inside(*command: str, check: bool = True, timeout_s: float = 1200.0) -> str:
    """Run a command in the namespace and return its output."""
    # `ip netns exec` would mount another /sys, in which the containers' runtime would find no cgroups.
    whole = ["nsenter", f"--net=/var/run/netns/{NAMESPACE}", *command]
    environment = os.environ | {"STORE_BYTES": "256M", "POOL_BYTES": "64M"}
    ran = subprocess.run(whole, capture_output=True, text=True, check=False, env=environment, timeout=timeout_s)
    assert not check or ran.returncode == 0, f"{' '.join(command)}: {ran.stdout[-2000:]}{ran.stderr[-4000:]}"
    return ran.stdout


def compose(*arguments: str, check: bool = True) -> str:
    return inside(*COMPOSE, "-f", str(FILE), *arguments, check=check)


@pytest.fixture
def running() -> Iterator[None]:
    engine = COMPOSE[0].split("-")[0]
    if os.geteuid() or not all(map(shutil.which, (COMPOSE[0], engine, "ip", "curl"))):
        pytest.skip(f"needs root, {COMPOSE[0]}, iproute2 and curl")
    if not all(
        subprocess.run([engine, "image", "inspect", f"antefix-{role}"], capture_output=True).returncode == 0
        for role in OURS
    ):
        pytest.skip('needs the images: make test-images TARGETS="kvstore router prefill decode"')
    subprocess.run(["ip", "netns", "add", NAMESPACE], check=True)
    try:
        inside("ip", "link", "set", "lo", "up")
        compose("up", "--no-build", "--detach")
        yield
    finally:
        compose("down", "--volumes", "--timeout", "60", check=False)
        subprocess.run(["ip", "netns", "delete", NAMESPACE], check=True)


def ask() -> dict[str, Any]:
    body = json.dumps(ASKED)
    said = inside(
        "curl",
        "-sS",
        "-m",
        "120",
        "-H",
        "content-type: application/json",
        "-d",
        body,
        "http://127.0.0.1:8000/v1/completions",
    )
    return dict(json.loads(said))


def test_the_compose_file_comes_up_answers_and_hits(running: None) -> None:
    # 1. All roles start in any order, find each other, and report that they are ready.
    ends = time.monotonic() + PATIENCE_S
    while "200" not in inside(
        "curl", "-s", "-o", "/dev/null", "-w", "%{http_code}", "http://127.0.0.1:8000/readyz", check=False
    ):
        assert time.monotonic() < ends, compose("logs", check=False)[-8000:]
        time.sleep(1.0)
    # 2. A prompt is computed once, and hit the second time with the same answer.
    first, second = ask(), ask()
    assert first["choices"][0]["text"] == second["choices"][0]["text"]
    cached = [each["usage"]["prompt_tokens_details"]["cached_tokens"] for each in (first, second)]
    assert cached[0] == 0 and cached[1] >= 128
    # 3. The file's health checks report the true state.
    for role in OURS:
        probe = services("compose.yaml")[role]["healthcheck"]["test"]
        assert "SERVING" in compose("exec", "-T", role, *probe[1:])
