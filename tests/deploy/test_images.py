"""The Containerfile is built and its images run: `make test-images`, as root, with buildah and debootstrap.

The base image is a Debian of debootstrap's, so no registry is asked. Images run as containers do: as PID 1 and nobody,
on a read-only root. TARGETS="kvstore router prefill decode" builds more than the two without torch.
VOLUMES: files of the host that a build also needs, such as a mirror's certificates: "/etc/pip.conf:/etc/pip.conf:ro".
TORCH_BACKEND: where uv takes torch from ("cpu"). If it is empty, uv's and pip's own settings decide.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.upgrade.versions import ROOT, checkout

IMAGES = ROOT / ".images"
SUITE = os.environ.get("SUITE", "bookworm")
BASE = f"localhost/antefix-base:{SUITE}"
TARGETS = os.environ.get("TARGETS", "kvstore router").split()
VOLUMES = os.environ.get("VOLUMES", "").split()
TORCH_BACKEND = os.environ.get("TORCH_BACKEND", "cpu")
IN_ROOT = ROOT / "tests" / "deploy" / "in_read_only_root.sh"
MODEL = "antefix_console/shipped/models/antefix-tiny"
PORTS = {"kvstore": 7001, "prefill": 7002, "decode": 7003, "router": 7000}

pytestmark = [pytest.mark.images, pytest.mark.services, pytest.mark.timeout(3600)]


def done(*command: object, check: bool = True) -> str:
    ran = subprocess.run([str(each) for each in command], capture_output=True, text=True, check=False)
    assert not check or ran.returncode == 0, f"{command[0]}: {ran.stdout[-2000:]}{ran.stderr[-4000:]}"
    return ran.stdout.strip()


@pytest.fixture(scope="module")
def base() -> str:
    if os.geteuid() or not all(map(shutil.which, ("buildah", "debootstrap", "unshare", "setpriv"))):
        pytest.skip("needs root, buildah and debootstrap (Debian: apt install buildah debootstrap)")
    if not done("buildah", "images", "--quiet", "--filter", f"reference={BASE}"):
        IMAGES.mkdir(exist_ok=True)
        root = IMAGES / SUITE
        packages = "python3,python3-venv,python3-pip,python-is-python3,ca-certificates"
        done("debootstrap", "--variant=minbase", f"--include={packages}", SUITE, root)
        made = done("buildah", "from", "scratch")
        done("buildah", "add", "--quiet", made, root, "/")
        done("buildah", "commit", "--rm", "--quiet", made, BASE)
        shutil.rmtree(root)
    return BASE


@pytest.fixture(scope="module")
def context(base: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The commit's files. For workers they include pins for the base's Python, as docs/CONTAINERS.md says."""
    tree = checkout("HEAD", tmp_path_factory.mktemp("images") / "context")
    if {"worker", "prefill", "decode"} & set(TARGETS):
        pins = ("pip", "compile", "--quiet", "pyproject.toml", "--extra", "worker", "--constraint", "constraints.txt")
        options = ["--generate-hashes", "--python-version", python_of(base), "--python-platform", "linux"]
        options += ["--torch-backend", TORCH_BACKEND] if TORCH_BACKEND else []
        output = ("--output-file", "deploy/containers/worker.txt")
        subprocess.run([sys.executable, "-m", "uv", *pins, *options, *output], cwd=tree, check=True)
    return tree


def python_of(image: str) -> str:
    """The version of the image's Python, such as 3.11."""
    container = done("buildah", "from", image)
    try:
        (found,) = Path(done("buildah", "mount", container)).glob("usr/bin/python3.[0-9]*[0-9]")
        return found.name.removeprefix("python")
    finally:
        done("buildah", "rm", container)


@pytest.fixture(params=TARGETS)
def image(request: pytest.FixtureRequest, base: str, context: Path) -> Iterator[tuple[str, Path]]:
    """A target, and its image's mounted file system."""
    target = request.param
    build = ["buildah", "bud", "--isolation", "chroot", "--network", "host", "--format", "docker", "--layers"]
    build += [option for volume in VOLUMES for option in ("--volume", volume)]
    build += ["--build-arg", f"BASE={base}", "--target", target, "--tag", f"antefix-{target}"]
    done(*build, "--file", context / "deploy" / "containers" / "Containerfile", context)
    container = done("buildah", "from", f"localhost/antefix-{target}")
    try:
        yield target, Path(done("buildah", "mount", container))
    finally:
        done("buildah", "rm", container)


def test_an_image_serves_as_nobody_on_a_read_only_root_and_ends_when_told(image: tuple[str, Path]) -> None:
    role, root = image
    assert not (root / "src").exists(), "the build's files are none of the image's"
    command = [
        "unshare",
        "--mount",
        "--net",
        "--pid",
        "--fork",
        "--kill-child",
        ROOT / "tests/deploy/in_read_only_root.sh",
    ]
    with subprocess.Popen(
        [*command, root, *serve(role, root)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        try:
            assert process.stdout is not None and process.stderr is not None
            line = process.stdout.readline()
            assert b'"ready": true' in line, process.stderr.read()
            (child,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            status = dict(row.split(":\t", 1) for row in Path(f"/proc/{child}/status").read_text().splitlines())
            assert status["Uid"].split()[0] == "10001"
            assert {int(status[name], 16) for name in ("CapEff", "CapBnd")} == {0} and status["NoNewPrivs"] == "1"
            inside = ("nsenter", "--target", child, "--mount", "--net", "--root", "--wd")
            health = ("/opt/antefix/bin/antefix", "health", f"127.0.0.1:{PORTS[role]}", "--role", role)
            # A router without workers is alive but not ready.
            said = done(*inside, *health, check=role != "router")
            assert "SERVING" in said
            assert "Read-only" in done(*inside, "sh", "-c", "touch /etc/antefix/x 2>&1; true")
            os.kill(int(child), signal.SIGTERM)
            assert process.wait(120) == 0
        finally:
            process.kill()


def serve(role: str, root: Path) -> list[str]:
    """The role's command with all flags that it needs to start."""
    address = f"127.0.0.1:{PORTS[role]}"
    if role == "kvstore":
        return ["antefix", "serve", "kvstore", "--dir", "/data/store", "--address", address]
    (model,) = root.glob(f"opt/antefix/lib/python3.*/site-packages/{MODEL}")
    command = ["antefix", "serve", role, "--model", f"/{model.relative_to(root)}", "--address", address]
    command += ["--secret-file", "/data/secret", "--store-address", "127.0.0.1:7001"]
    command += ["--leases", "true", "--ledger-dir", "/data/ledger"] if role == "router" else ["--pool-bytes", "64M"]
    return ["sh", "-c", f"antefix secret create /data/secret >/dev/null && exec {' '.join(command)}"]
