"""What does it cost a router to follow an engine's KV events: memory per block, and processor time per event?

    python benchmarks/follow_events.py --json benchmarks/results/follow_events.json

One engine reports blocks of 16 tokens: all blocks of a prompt in one event, as after a prefill, or each block in an
event of its own, as while tokens are generated. A message holds the events of one prompt. Messages are read as they
come from the engine's socket, then entered into the index and the router's directory. Memory is the growth of resident
memory while the prompts' events are followed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from antefix.events.kv_events import KvStored, decode_batch, encode_batch
from antefix.secret import Keyring
from antefix_router.fleet.engine_index import EngineIndex
from antefix_router.fleet.fleet_names import FleetNames
from antefix_router.placement.directory import Directory
from benchmarks.run_record import write

BLOCK_SIZE = 16
VOCAB_SIZE = 129_280


def message(prompt: int, num_blocks: int, per_event: int) -> bytes:
    """One prompt's events as an engine sends them, with this many blocks in each event."""
    tokens = np.random.default_rng(prompt).integers(0, VOCAB_SIZE, num_blocks * BLOCK_SIZE).tolist()
    first = (prompt + 1) << 32
    events = tuple(
        KvStored(
            block_hashes=list(range(first + start, first + start + per_event)),
            parent_block_hash=first + start - 1 if start else None,
            token_ids=tokens[start * BLOCK_SIZE : (start + per_event) * BLOCK_SIZE],
            block_size=BLOCK_SIZE,
            lora_id=None,
            medium="GPU",
            lora_name=None,
        )
        for start in range(0, num_blocks, per_event)
    )
    return encode_batch(events, ts=0.0)


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def measure(num_prompts: int, num_blocks: int, per_event: int) -> dict[str, float]:
    index = EngineIndex("engine", Directory(), FleetNames(Keyring(b"0123456789abcdef")))
    # The first prompts are not counted: they load code and make the tables' first pages.
    for prompt in range(num_prompts, num_prompts + 4):
        index.apply(decode_batch(message(prompt, num_blocks, per_event)))
    before, warm, seconds = resident_bytes(), len(index), 0.0
    for prompt in range(num_prompts):
        payload = message(prompt, num_blocks, per_event)
        started = time.process_time()
        index.apply(decode_batch(payload))
        seconds += time.process_time() - started
    blocks = len(index) - warm
    return {
        "blocks": blocks,
        "bytes_per_block": round((resident_bytes() - before) / blocks),
        "cpu_us_per_block": round(1e6 * seconds / blocks, 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--blocks", type=int, default=1000, help="per prompt")
    parser.add_argument("--json", type=Path, help="also write the record here")
    args = parser.parse_args()
    record: dict[str, Any] = {
        "block_size": BLOCK_SIZE,
        "one_event_per_prompt": measure(args.prompts, args.blocks, args.blocks),
        "one_event_per_block": measure(args.prompts // 10, args.blocks, 1),
    }
    # The second index fills memory that the first one freed, so its growth says nothing.
    del record["one_event_per_block"]["bytes_per_block"]
    sys.stdout.write(json.dumps(record, indent=1) + "\n")
    if args.json:
        write(args.json, record, "msgspec")
    return 0


if __name__ == "__main__":
    sys.exit(main())
