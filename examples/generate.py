"""Sends one prompt to a running router, and prints the streamed answer and the request's usage.

antefix up --address 127.0.0.1:7000 &
python examples/generate.py 127.0.0.1:7000 'class Test(unittest.TestCase):'
"""

import sys

from antefix import AntefixError, BlockingRouterClient, Sampling

address, prompt = sys.argv[1:]
try:
    with BlockingRouterClient(address) as router:
        for message in router.generate(prompt, Sampling(max_tokens=64)):
            print(message.text, end="", flush=True)
except AntefixError as err:
    sys.exit(f"no answer: {err}")
usage = message.usage
print(f"\n[{usage.cache_hit_tokens} of {usage.prompt_tokens} prompt tokens hit, {usage.output_tokens} generated]")
