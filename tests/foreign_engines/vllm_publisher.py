"""vLLM's own publisher of KV events, run by vLLM's Python. Lines of JSON say which events to publish.

{"store": [first, last]}   blocks of a chain whose tokens count up    {"remove": [block, ...]}    {"clear": true}
{"lose": bool}             what follows does not go out               Each line is answered with "ok".
"""

import json
import sys

from vllm.distributed.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, KVEventBatch, ZmqEventPublisher

SIZE = 16


def name(block):
    return block.to_bytes(32, "big")


def event_of(order):
    if "store" in order:
        first, last = order["store"]
        return BlockStored(
            block_hashes=[name(block) for block in range(first, last)],
            parent_block_hash=name(first - 1) if first else None,
            token_ids=list(range(first * SIZE, last * SIZE)),
            block_size=SIZE,
            lora_id=None,
            medium="GPU",
            lora_name=None,
            group_idx=0,
            kv_cache_spec_kind="full_attention",
        )
    if "remove" in order:
        return BlockRemoved(block_hashes=[name(block) for block in order["remove"]], medium="GPU", group_idx=0)
    return AllBlocksCleared()


publisher = ZmqEventPublisher(0, endpoint=sys.argv[1], replay_endpoint=sys.argv[2], buffer_steps=int(sys.argv[3]))
send = publisher._pub.send_multipart
loses = False
publisher._pub.send_multipart = lambda frames: None if loses else send(frames)
print("ok", flush=True)
for line in sys.stdin:
    order = json.loads(line)
    if "lose" in order:
        # Earlier events must be sent first.
        publisher._event_queue.join()
        loses = order["lose"]
    else:
        publisher.publish(KVEventBatch(ts=0.0, events=[event_of(order)]))
        publisher._event_queue.join()
    print("ok", flush=True)
