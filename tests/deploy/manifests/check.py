"""Renders the Kubernetes manifests and checks them offline: `make test-manifests`.

Checks them against schemas of several Kubernetes versions (kubernetes-validate, which refuses unknown fields), schemas
of custom resources (custom_resources.mjs), and checkov's policies. Also checks the compose files and the Containerfile.
Needs kubectl and node, and runs in the environment .manifests/.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[3]
DEPLOY = ROOT / "deploy"
TOOLS, ENVIRONMENT = Path(sys.executable).parent, Path(sys.prefix)
VERSIONS = ("1.29", "1.31", "1.34", "1.37")
CUSTOM = ("cert-manager.io/", "keda.sh/", "monitoring.coreos.com/")
# checkov's policies that the manifests do not follow, and why.
SKIPPED = {
    "CKV_K8S_11": "no CPU limits: a worker that is throttled in the middle of a step is late for everybody",
    "CKV_K8S_15": "images are pulled where they are missing: a digest says which one",
    "CKV_K8S_43": "the digest is the deployer's own registry's",
}


def main() -> int:
    for tool in ("kubectl", "node"):
        if shutil.which(tool) is None:
            sys.stderr.write(f"{tool} is needed: Debian has it as kubernetes-client and nodejs\n")
            return 2
    with tempfile.TemporaryDirectory() as scratch:
        for name, text in rendered(Path(scratch)).items():
            check(name, text, Path(scratch))
    compose = sorted(map(str, (*DEPLOY.rglob("compose*.yaml"), *(ROOT / "examples").rglob("compose*.yaml"))))
    run("compose files", TOOLS / "check-jsonschema", "--builtin-schema", "vendor.compose-spec", *compose)
    run("Containerfile", TOOLS / "hadolint", DEPLOY / "containers" / "Containerfile")
    return 0


def rendered(scratch: Path) -> dict[str, str]:
    """Rendered manifests by name: the base, each overlay, and the example with its other kind of autoscaler."""
    folders = {"base": DEPLOY / "kubernetes" / "base"}
    folders |= {path.name: path for path in sorted((DEPLOY / "kubernetes" / "overlays").iterdir())}
    copy = scratch / "kubernetes"
    shutil.copytree(DEPLOY / "kubernetes", copy)
    example = copy / "overlays" / "example" / "kustomization.yaml"
    text = example.read_text()
    assert "components/keda" in text
    example.write_text(text.replace("components/keda", "components/hpa"))
    folders["example with HPA"] = example.parent
    return {name: run("", "kubectl", "kustomize", path) for name, path in folders.items()}


def check(name: str, text: str, scratch: Path) -> None:
    documents: list[dict[str, Any]] = list(yaml.safe_load_all(text))
    custom = [each for each in documents if each["apiVersion"].startswith(CUSTOM)]
    # 1. Kubernetes' own kinds of resources, against each version.
    native = scratch / "native.yaml"
    native.write_text(yaml.safe_dump_all(each for each in documents if each not in custom))
    for version in VERSIONS:
        what = f"{name}: {len(documents) - len(custom)} resources, Kubernetes {version}"
        run(what, TOOLS / "kubernetes-validate", "--strict", "--quiet", "-k", version, native)
    # 2. Custom resources of operators.
    number = run("", "node", ENVIRONMENT / "custom_resources.mjs", stdin=json.dumps(custom))
    assert int(number) == len(custom)
    print(f"{name}: {number.strip()} resources of cert-manager, KEDA and the Prometheus operator", flush=True)
    # 3. Policies, for manifests that are applied. The base is not checked, because it has no namespace yet.
    if name == "base":
        return
    whole = scratch / "whole.yaml"
    whole.write_text(text)
    checkov = ("checkov", "--framework", "kubernetes", "--compact", "--quiet", "--skip-download")
    run(f"{name}: policies", TOOLS / checkov[0], *checkov[1:], "--skip-check", ",".join(SKIPPED), "--file", whole)


def run(what: str, *command: object, stdin: str | None = None) -> str:
    """Run a command and return its output. If the command fails, the whole check ends."""
    done = subprocess.run([str(each) for each in command], input=stdin, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.stderr.write(f"{what or command[0]} failed:\n{done.stdout}{done.stderr}")
        raise SystemExit(1)
    if what:
        print(f"{what}: ok", flush=True)
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
