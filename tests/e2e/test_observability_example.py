"""The observability example starts, gets load, and stops all that it started."""

import os
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
import yaml

from tests.redis_servers import free_port
from tests.waiting import AT_MOST_S

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "observability"


@pytest.mark.long
@pytest.mark.services
def test_the_script_runs_its_load_and_leaves_nothing(tmp_path):
    bin_dir = tmp_path / "bin"
    bin_dir.mkdir()
    antefix = bin_dir / "antefix"
    antefix.write_text(f'#!/bin/sh\nexec {sys.executable} -m antefix_console "$@"\n')
    antefix.chmod(0o755)
    port, other = free_port(), free_port()
    environment = os.environ | {
        "PATH": f"{bin_dir}:{os.environ['PATH']}",
        "HTTP_ADDRESS": f"127.0.0.1:{port}",
        "PROMETHEUS_ADDRESS": f"127.0.0.1:{other}",
        "REQUESTS": "6",
        "SPEED": "1000",
        "TMPDIR": str(tmp_path),
    }
    done = subprocess.run(
        [EXAMPLE / "run.sh"], env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "6 of 6 requests answered" in done.stdout and f"http://127.0.0.1:{port}/ui" in done.stdout
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=AT_MOST_S)
    assert [each.name for each in tmp_path.iterdir()] == ["bin"]


def test_the_compose_file_names_files_that_are_there():
    services = yaml.safe_load((EXAMPLE / "compose.yaml").read_text())["services"]
    for service in services.values():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert source == "data" or (EXAMPLE / source).exists(), source
    targets = (ROOT / "deploy" / "prometheus.yml").read_text()
    assert "/var/lib/antefix/metrics-targets.json" in targets
    for path in EXAMPLE.glob("grafana/*/*.yaml"):
        assert yaml.safe_load(path.read_text())["apiVersion"] == 1
