"""Runs the fast tests on the lowest and the newest versions that pyproject.toml allows: `make test-bounds`.

Each environment lies in .bounds/ (ignored by git). NAME.txt next to it lists the versions that uv resolved. Tests run
in a copy of the tracked files, because a build writes antefix/v1 into the tree that it builds.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
BOUNDS = ROOT / ".bounds"
ENDS = {"lowest": "lowest-direct", "newest": "highest"}
# Extras that a deployment can install. Their bounds are tried. Engines have environments of their own.
EXTRAS = ("worker", "fleet", "client", "parquet", "otel", "plots", "s3")
# Tools of development: any version that fits will do, because no user installs them.
NOT_TRIED = {"antefix", "grpcio-tools"}
LEFT_OUT = ("long", "gpu", "browser", "hosts", "environments", "s3", "upgrade", "services", "slow")
FAST = " and ".join(f"not {marker}" for marker in LEFT_OUT)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", action="append", metavar="VERSION", help="such as 3.12 (default: this one)")
    parser.add_argument("--end", action="append", choices=ENDS, help="default: both")
    parser.add_argument("--install-only", action="store_true", help="resolve, install and import, run no tests")
    parser.add_argument("pytest", nargs="*", help="arguments for pytest instead of the fast tests")
    args = parser.parse_args()
    failed = []
    for version in args.python or [f"{sys.version_info.major}.{sys.version_info.minor}"]:
        for end in args.end or ENDS:
            environment = install(version, end)
            if not args.install_only and run_tests(environment, args.pytest):
                failed.append(environment.name)
    print(f"failed on: {', '.join(failed)}" if failed else "all ends passed", flush=True)
    return 1 if failed else 0


def install(version: str, end: str) -> Path:
    """The environment `.bounds/VERSION-END` with the package and its tests' needs. Raises if it does not install."""
    environment = BOUNDS / f"{version}-{end}"
    python, pins = environment / "bin/python", BOUNDS / f"{environment.name}.txt"
    BOUNDS.mkdir(exist_ok=True)
    wanted = BOUNDS / f"{environment.name}.in"
    wanted.write_text("\n".join(requirements()) + "\n")
    uv("venv", "--quiet", "--clear", "--python", version, environment)
    # 1. The dependencies at this end of their bounds, and tools that fit them.
    uv("pip", "compile", "--quiet", "--resolution", ENDS[end], "--python", python, "--output-file", pins, wanted)
    uv("pip", "install", "--quiet", "--python", python, "--requirement", pins)
    # 2. The package itself: its build generates antefix/v1 with the pinned compiler.
    uv("pip", "install", "--quiet", "--python", python, "--no-deps", "--editable", copy_of_the_tree(environment.name))
    print(f"{environment.name}: {python} has {len(pins.read_text().splitlines())} packages", flush=True)
    return environment


def run_tests(environment: Path, arguments: Sequence[str]) -> int:
    command = [environment.absolute() / "bin/python", "-m", "pytest", "-q", "-n", "2", "--dist", "worksteal"]
    command += arguments or ["-m", FAST]
    variables = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(command, cwd=BOUNDS / f"tree-{environment.name}", env=variables | {"OMP_NUM_THREADS": "1"})
    print(f"{environment.name}: {'passed' if done.returncode == 0 else 'failed'}", flush=True)
    return done.returncode


def requirements() -> list[str]:
    """Dependencies with pyproject.toml's bounds, and development tools at the versions of constraints.txt."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    tried = [*project["dependencies"], *(line for extra in EXTRAS if extra in extras for line in extras[extra])]
    tried = [line for line in tried if not line.startswith("antefix[")]
    known = {name_of(line) for line in tried}
    pinned = {name_of(line): line for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    tools = [line for line in extras["dev"] if name_of(line) not in known | NOT_TRIED]
    return [*tried, *(pinned.get(name_of(line), line) for line in tools)]


def name_of(requirement: str) -> str:
    found = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert found, requirement
    return re.sub(r"[-_.]+", "-", found[0]).lower()


def copy_of_the_tree(name: str) -> Path:
    """Copy the tree's tracked and new files, and no ignored ones."""
    tree = BOUNDS / f"tree-{name}"
    shutil.rmtree(tree, ignore_errors=True)
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    for path in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / path).is_file():
            (tree / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / path, tree / path)
    return tree


def uv(*arguments: object) -> None:
    subprocess.run([sys.executable, "-m", "uv", *map(str, arguments)], check=True, cwd=ROOT)


if __name__ == "__main__":
    sys.exit(main())
