"""A conversation over gRPC: each turn resends the whole conversation, and only its new tokens miss the cache.

antefix up --address 127.0.0.1:7000 &
python examples/conversation.py 127.0.0.1:7000
"""

import asyncio
import sys

import numpy as np

from antefix import RouterClient, Sampling

QUESTIONS = ("What is a prefix cache?", "Why does it help?", "When does it not?")


async def main(address: str) -> None:
    async with RouterClient(address) as router:
        history = np.empty(0, np.uint32)
        for question in QUESTIONS:
            turn = np.frombuffer(f"\nQ: {question}\nA:".encode(), np.uint8).astype(np.uint32)
            history = np.concatenate((history, turn))
            print(f"\nQ: {question}\nA:", end="", flush=True)
            async for message in router.generate(history, Sampling(max_tokens=100), tenant="example"):
                # The example resends tokens, not text. So the model's answer is unchanged, and the next turn hits it.
                history = np.concatenate((history, message.tokens))
                print(message.text, end="", flush=True)
            usage = message.usage
            hit, miss = usage.cache_hit_tokens, usage.cache_miss_tokens
            print(f"\n   [{usage.prompt_tokens} prompt tokens: {hit} hit, {miss} miss]")


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
