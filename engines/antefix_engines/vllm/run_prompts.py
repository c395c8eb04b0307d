"""Runs prompts through vLLM and says what came of each: python -m antefix_engines.vllm.run_prompts < job.json

The job: {"llm": arguments of `vllm.LLM`, "steps": [...]}; a step is one of
    {"do": "run", "name": "...", "prompts": [[token, ...], ...], "num_tokens": 8, "is_cold": false, "is_stored": true}
    {"do": "forget"}               vLLM's own caches are emptied; the tiers keep what they have
    {"do": "fault", "name": "..."} from now on restored rows lack something (`antefix_engines.vllm.faults`)
    {"do": "damage", "directory": "...", "position": 512}  a bit of the store's blocks that end there is flipped
Standard output gets one line of JSON for each run, begun by `ANSWER`; everything else there is vLLM's.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any, Final

from prometheus_client import REGISTRY

from antefix_engines.vllm.faults import flip_blocks, plant

MARK: Final = "ANSWER "
# vLLM moves rows between steps of its scheduler, so a few short requests are run to cause steps.
NUM_FLUSHES: Final = 6


def main() -> None:
    job = json.load(sys.stdin)
    from vllm import LLM

    llm = LLM(**job["llm"])
    for step in job["steps"]:
        if step["do"] == "forget":
            _flush(llm)
            llm.reset_prefix_cache(reset_connector=True)
        elif step["do"] == "fault":
            plant(step["name"])
        elif step["do"] == "damage":
            flip_blocks(Path(step["directory"]), step["position"])
        else:
            print(MARK + json.dumps(_run(llm, step)), flush=True)
    _flush(llm)
    llm.llm_engine.engine_core.shutdown()


def _run(llm: Any, step: dict[str, Any]) -> dict[str, Any]:
    from vllm.inputs import TokensPrompt

    params = _params(step["num_tokens"], is_cold=step.get("is_cold", False), is_stored=step.get("is_stored", True))
    start = time.monotonic()
    outputs = llm.generate([TokensPrompt(prompt_token_ids=each) for each in step["prompts"]], params, use_tqdm=False)
    seconds = time.monotonic() - start
    answers = [
        {
            "tokens": list(output.outputs[0].token_ids),
            "logprobs": [next(iter(each.values())).logprob for each in output.outputs[0].logprobs],
            "num_cached": output.num_cached_tokens,
        }
        for output in outputs
    ]
    _flush(llm)
    return {"name": step["name"], "seconds": seconds, "answers": answers, "metrics": _metrics()}


def _params(num_tokens: int, *, is_cold: bool, is_stored: bool) -> Any:
    """is_cold: read nothing from any cache."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True, logprobs=1)
    params.skip_reading_prefix_cache = is_cold
    if not is_stored:
        params.extra_args = {"kv_transfer_params": {"max_offload_tokens": 0}}
    return params


def _flush(llm: Any) -> None:
    from vllm.inputs import TokensPrompt

    for _ in range(NUM_FLUSHES):
        llm.generate([TokensPrompt(prompt_token_ids=[2, 3])], _params(1, is_cold=True, is_stored=False), use_tqdm=False)


def _metrics() -> dict[str, float]:
    """Counters of the tiers, as vLLM exposes them to Prometheus."""
    totals: dict[str, float] = {}
    for family in REGISTRY.collect():
        if family.type == "counter" and any(word in family.name for word in ("kv_offload", "antefix", "external")):
            found = sum(each.value for each in family.samples if each.name.endswith("_total"))
            if found:
                totals[family.name] = found
    return totals


if __name__ == "__main__":
    main()
