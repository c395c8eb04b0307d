"""A release, in two steps; nothing is pushed or uploaded.

`make release-tag`: the changelog's part gets today's date, which is committed, and the commit the tag vX.Y.Z.
`make release`: makes what the release consists of, in dist/, of the commit that has the tag:

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
from datetime import UTC, date, datetime
from pathlib import Path

ROOT = Path(__file__).parents[1]
DIST = ROOT / "dist"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--allow-unreleased",
        action="store_true",
        help="rehearse a release; uncommitted changes, a missing date or a missing tag are allowed",
    )
    parser.add_argument("--tag", action="store_true", help="write the release date, commit and tag it; build nothing")
    parser.add_argument("--sign", action="store_true", help="sign the new tag with your key (only with --tag)")
    args = parser.parse_args()
    version = str(runpy.run_path(str(ROOT / "antefix" / "version.py"))["__version__"])
    try:
        if args.tag:
            tag(version, sign=args.sign)
        else:
            build(version, is_rehearsal=args.allow_unreleased)
    except ValueError as err:
        sys.stderr.write(f"release: {err}\n")
        return 2
    return 0


def tag(version: str, *, sign: bool) -> None:
    """Raises:  ValueError: it is tagged already, there are changes, or the changelog has nothing to say."""
    check_committed()
    if output("git", "tag", "--list", f"v{version}"):
        raise ValueError(f"v{version} is there already: write the next version into antefix/version.py")
    log = ROOT / "CHANGELOG.md"
    text = dated(version, log.read_text(), datetime.now(UTC).date())
    changes = changes_of(version, text)
    if text != log.read_text():
        log.write_text(text)
        output("git", "commit", "--quiet", "--message", f"Release {version}", "CHANGELOG.md")
    # As it is: git would take the changelog's headings for comments.
    message = ("--cleanup=verbatim", "--message", f"Antefix {version}\n\n{changes}")
    output("git", "tag", "--sign" if sign else "--annotate", *message, f"v{version}")
    print(f"tagged v{version} at {output('git', 'rev-parse', '--short', 'HEAD')}; next: make release")


def build(version: str, *, is_rehearsal: bool) -> None:
    """Raises:  ValueError: this is not the commit that has the version's tag, or its changelog is open."""
    # 1. What is released is a commit, and the changelog says what is in it.
    changes = changes_of(version, (ROOT / "CHANGELOG.md").read_text(), allow_unreleased=is_rehearsal)
    if not is_rehearsal:
        check_committed()
        if f"v{version}" not in output("git", "tag", "--points-at", "HEAD").splitlines():
            raise ValueError(f"this commit has no tag v{version}: run make release-tag, or git checkout v{version}")
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
    print(f"next: git push --follow-tags origin v{version}; upload what is in {DIST.name}/")


def check_committed() -> None:
    """Raises:  ValueError: a tracked file has changes."""
    if output("git", "status", "--porcelain", "--untracked-files=no"):
        raise ValueError("there are changes that are not committed")


def dated(version: str, changelog: str, day: date) -> str:
    """The changelog with the date instead of "unreleased" in the version's heading."""
    return re.sub(rf"^(## {re.escape(version)}) \(unreleased\)$", rf"\1 ({day})", changelog, flags=re.MULTILINE)


def changes_of(version: str, changelog: str, *, allow_unreleased: bool = False) -> str:
    """The version's part. Raises: ValueError: the changelog has no section for the version, the section is empty, or it
    says that the version is not released.
    """
    found = re.search(
        rf"^## {re.escape(version)}(?![.\w])(.*?)$\n(.*?)(?=^## |\Z)", changelog, re.MULTILINE | re.DOTALL
    )
    if found is None and allow_unreleased:
        found = re.search(r"^## \S+(.*?)$\n(.*?)(?=^## |\Z)", changelog, re.MULTILINE | re.DOTALL)
    if found is None:
        raise ValueError(f"CHANGELOG.md has no part for {version}: is antefix/version.py up to date?")
    if "unreleased" in found[1] and not allow_unreleased:
        raise ValueError(f"CHANGELOG.md says that {version} is unreleased: `make release-tag` writes the date there")
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
    return subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True, text=True).stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
