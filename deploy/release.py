"""Makes what a release consists of, in dist/: `make release`. It tags nothing and uploads nothing.

antefix-X.Y.Z-py3-none-any.whl, antefix-X.Y.Z.tar.gz    built from the commit alone, with its time: twice the same bytes
antefix-X.Y.Z.cdx.json                                  SBOM (CycloneDX) of the versions that the tests run with
CHANGES.md                                              the version's part of the changelog
SHA256SUMS                                              of all of them
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
DIST = ROOT / "dist"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--allow-unreleased", action="store_true", help="a rehearsal: changes and date may be open")
    args = parser.parse_args()
    version = str(runpy.run_path(str(ROOT / "antefix" / "version.py"))["__version__"])
    # 1. What is released is a commit, and the changelog says what is in it.
    try:
        changes = changes_of(version, (ROOT / "CHANGELOG.md").read_text(), allow_unreleased=args.allow_unreleased)
        if not args.allow_unreleased and output("git", "status", "--porcelain", "--untracked-files=no"):
            raise ValueError("there are changes that are not committed")
    except ValueError as err:
        sys.stderr.write(f"release: {err}\n")
        return 2
    shutil.rmtree(DIST, ignore_errors=True)
    DIST.mkdir()
    # 2. Wheel and sdist, of tracked files alone.
    with tempfile.TemporaryDirectory() as scratch:
        tree = Path(scratch) / f"antefix-{version}"
        tree.mkdir()
        packed = subprocess.run(["git", "archive", "HEAD"], cwd=ROOT, capture_output=True, check=True).stdout
        subprocess.run(["tar", "x"], cwd=tree, input=packed, check=True)
        time = output("git", "log", "-1", "--format=%ct")
        environment = os.environ | {"SOURCE_DATE_EPOCH": time}
        subprocess.run([sys.executable, "-m", "build", "--outdir", DIST, tree], check=True, env=environment)
    built = sorted(DIST.iterdir())
    subprocess.run([sys.executable, "-m", "twine", "check", "--strict", *built], check=True)
    # 3. What it was tested with, and what changed.
    sbom = DIST / f"antefix-{version}.cdx.json"
    write_sbom(sbom, version)
    (DIST / "CHANGES.md").write_text(changes)
    # 4. Sums over all of it.
    sums = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}" for path in sorted(DIST.iterdir())]
    (DIST / "SHA256SUMS").write_text("\n".join(sums) + "\n")
    print("\n".join(sums))
    print(f"next: git tag -s v{version} && git push origin v{version}; upload what is in {DIST.name}/")
    return 0


def changes_of(version: str, changelog: str, *, allow_unreleased: bool = False) -> str:
    """The version's part. Raises:  ValueError: there is none, it is empty, or says that it is not released."""
    found = re.search(
        rf"^## {re.escape(version)}(?![.\w])(.*?)$\n(.*?)(?=^## |\Z)", changelog, re.MULTILINE | re.DOTALL
    )
    if found is None and allow_unreleased:
        found = re.search(r"^## \S+(.*?)$\n(.*?)(?=^## |\Z)", changelog, re.MULTILINE | re.DOTALL)
    if found is None:
        raise ValueError(f"CHANGELOG.md has no part for {version}: is antefix/version.py up to date?")
    if "unreleased" in found[1] and not allow_unreleased:
        raise ValueError(f"CHANGELOG.md says that {version} is unreleased: put the date there")
    if not found[2].strip():
        raise ValueError(f"CHANGELOG.md says nothing of {version}")
    return found[2].strip() + "\n"


def write_sbom(path: Path, version: str) -> None:
    """CycloneDX, of the pinned versions. Raises where the tool fails."""
    command = [
        "cyclonedx_py",
        "requirements",
        str(ROOT / "constraints.txt"),
        "--pyproject",
        str(ROOT / "pyproject.toml"),
    ]
    command += ["--mc-type", "library", "--output-reproducible", "--no-validate", "--output-file", str(path)]
    subprocess.run([sys.executable, "-m", *command], check=True, cwd=ROOT)
    # pyproject.toml takes the version from a file, which the tool does not read.
    document = json.loads(path.read_text())
    document["metadata"]["component"]["version"] = version
    path.write_text(json.dumps(document, indent=2, sort_keys=True) + "\n")


def output(*command: str) -> str:
    return subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True).stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
