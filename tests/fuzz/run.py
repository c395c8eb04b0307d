"""Fuzz the readers of outside bytes: `make fuzz`, or `python -m tests.fuzz.run [TARGET ...] --seconds 600`.

atheris guides the fuzzing by coverage. A run keeps its results, and the next run continues: DIR/TARGET has the inputs,
DIR/crashes the inputs that broke a rule, and DIR/hours.json the total time of each target. The exit code is 1 if an
input broke a rule.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import re
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.run_record import write

HERE = Path(__file__).parent
# An input that takes longer is a finding, because readers must end in bounded time.
INPUT_SECONDS_MAX = 10
MEMORY_MB_MAX = 3000
INPUT_BYTES_MAX = 4096


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("targets", nargs="*", help="which; none: all")
    parser.add_argument("--seconds", type=float, default=600, help="for each target (default: 600)")
    parser.add_argument("--kept", type=Path, default=Path(".fuzz"), metavar="DIR", help="where a run continues")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the hours of all runs there, for the records")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return fuzz_here(args.targets[0], args.seconds, args.kept)
    if importlib.util.find_spec("atheris") is None:
        print("atheris is not installed here: `make fuzz` brings it", file=sys.stderr)
        return 2
    from tests.fuzz.targets import TARGETS

    broken = 0
    for name in args.targets or TARGETS:
        broken += fuzz(name, args.seconds, args.kept)
    if args.json:
        write(args.json, summary(json.loads((args.kept / "hours.json").read_text())), "atheris")
    return 1 if broken else 0


def summary(targets: dict[str, dict[str, float]]) -> dict[str, object]:
    """Totals of the kept directory, by target and for all targets."""
    hours = sum(each["seconds"] for each in targets.values()) / 3600
    totals = {name: sum(each[name] for each in targets.values()) for name in ("executions", "crashes")}
    return {"hours": round(hours, 2), **totals, "targets": targets}


def fuzz(name: str, seconds: float, kept: Path) -> int:
    """Run a target for this time, and continue after crashes. Returns the number of inputs that broke a rule."""
    found = 0
    begin = time.monotonic()
    crashes = kept / "crashes"
    crashes.mkdir(parents=True, exist_ok=True)
    while (left := seconds - (time.monotonic() - begin)) >= 1:
        command = [sys.executable, "-m", "tests.fuzz.run", name, "--child", "--seconds", str(left), "--kept", str(kept)]
        run = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        crashed = run.returncode != 0
        found += crashed
        note(kept / "hours.json", name, *effort_of(run.stderr), crashed)
        if crashed:
            (crashes / f"{name}-{time.time_ns()}.log").write_text(run.stdout[-20_000:] + run.stderr[-20_000:])
            print(f"{name}: broke; see {crashes}", flush=True)
            if found >= 20:
                break
    total = json.loads((kept / "hours.json").read_text())[name]
    hours = total["seconds"] / 3600
    print(f"{name}: {total['executions']} inputs in {hours:.2f} h, {total['crashes']} broke", flush=True)
    return found


def effort_of(text: str) -> tuple[float, int]:
    """Seconds and inputs without the start, from libFuzzer's summary, or from the last line if the run crashed."""
    if done := re.search(r"Done (\d+) runs in (\d+) second", text):
        return float(done[2]), int(done[1])
    progress = re.findall(r"^#(\d+)\s.*exec/s: (\d+)", text, re.MULTILINE)
    number, rate = map(int, progress[-1]) if progress else (0, 0)
    return number / max(rate, 1), number


def note(path: Path, name: str, seconds: float, executions: int, crashed: bool) -> None:
    hours = json.loads(path.read_text()) if path.exists() else {}
    before = hours.get(name, {"seconds": 0.0, "executions": 0, "crashes": 0})
    hours[name] = {
        "seconds": round(before["seconds"] + seconds, 1),
        "executions": before["executions"] + executions,
        "crashes": before["crashes"] + int(crashed),
    }
    path.write_text(json.dumps(hours, indent=1) + "\n")


def fuzz_here(name: str, seconds: float, kept: Path) -> int:
    """Fuzz in this process, which libFuzzer ends."""
    import atheris

    with atheris.instrument_imports(include=["antefix", "antefix_billing", "antefix_router", "antefix_simulate"]):
        from tests.fuzz.targets import TARGETS

        # Import everything now. A late import would count as the first input's time and would not be instrumented.
        with contextlib.suppress(Exception):
            TARGETS[name](b"\0{}")
    corpus = kept / name
    corpus.mkdir(parents=True, exist_ok=True)
    committed = HERE / "corpus" / name
    flags = [
        f"-max_total_time={max(1, int(seconds))}",
        f"-timeout={INPUT_SECONDS_MAX}",
        f"-rss_limit_mb={MEMORY_MB_MAX}",
        f"-max_len={INPUT_BYTES_MAX}",
        f"-artifact_prefix={kept / 'crashes'}/{name}-",
    ]
    atheris.Setup([sys.argv[0], *flags, str(corpus), *([str(committed)] if committed.exists() else [])], TARGETS[name])
    atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main())
