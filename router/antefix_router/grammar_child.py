"""A process that checks grammars. The grammar engine's own limits do not stop every grammar from taking too long, but a
process can be ended.

The process reads one grammar per line, as a JSON string. It answers each grammar with a JSON string that says why the
grammar cannot be used; the string is empty if it can. The process ends if a grammar exceeds its limit of processor time
or memory; the caller then starts another.
"""

from __future__ import annotations

import json
import resource
import sys

import llguidance.numpy as masks
import numpy as np

from antefix.grammar import Vocabulary, reason
from antefix.tokenizer import load_tokenizer

CPU_S_MAX = 2
MEMORY_BYTES_MAX = 4 << 30
# Only the first tokens are checked: a costly grammar is costly from the beginning, or is stopped by the engine's
# limits.
NUM_STEPS = 16


def fault(vocabulary: Vocabulary, grammar: str) -> str:
    """Why no output can follow the grammar; empty if some output can."""
    matcher = vocabulary.matcher(grammar)
    bits = masks.allocate_token_bitmask(1, vocabulary.size)
    draw = np.random.default_rng(0)
    for _ in range(NUM_STEPS):
        if matcher.is_error() or matcher.is_stopped():
            break
        masks.fill_next_token_bitmask(matcher, bits)
        allowed = np.flatnonzero(np.unpackbits(bits.view(np.uint8), bitorder="little"))
        if not matcher.is_error() and len(allowed):
            matcher.consume_token(int(draw.choice(allowed)))
    return reason(matcher.get_error()) if matcher.is_error() else ""


def main(model: str, vocab_size: int) -> None:
    vocabulary = Vocabulary(load_tokenizer(model), vocab_size)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES_MAX, MEMORY_BYTES_MAX))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for line in sys.stdin:
        used = resource.getrusage(resource.RUSAGE_SELF)
        seconds = int(used.ru_utime + used.ru_stime) + CPU_S_MAX
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, resource.RLIM_INFINITY))
        print(json.dumps(fault(vocabulary, json.loads(line))), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
