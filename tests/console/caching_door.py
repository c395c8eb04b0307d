"""Our own HTTP API over scripted workers with a prefix cache, on simulated time; tests can plant faults in it."""

from __future__ import annotations

from dataclasses import dataclass, field

from tests.gateway.scripted import Script

BLOCK = 64


class SimulatedTime:
    def __init__(self):
        self.now_s = 0.0

    def clock(self):
        return self.now_s

    async def sleep(self, seconds):
        self.now_s += seconds


@dataclass
class CachingScript(Script):
    """Hits end at whole blocks that the same tenant and user sent before.

    lifetime_s: time from a prefix's last use until it is dropped.
    shares: the part of (tenant, user) by which callers are isolated. Less than both is a fault.
    claims_tokens: hit tokens reported beyond the real ones, a fault.  changes_answers: a hit gives a different text.
    """

    time: SimulatedTime = field(default_factory=SimulatedTime)
    lifetime_s: float = 1e9
    shares: str = "nothing"
    claims_tokens: int = 0
    changes_answers: bool = False
    used_at: dict = field(default_factory=dict)

    async def run(self, generation, timeout_s):
        request = generation.request
        tokens = request.tokens.tolist()
        owner = {"nothing": request.cache_tenant, "users": request.caller.tenant, "all": ""}[self.shares]
        hit = 0
        for stop in range(BLOCK, len(tokens), BLOCK):
            name = (owner, hash(tuple(tokens[:stop])))
            if self.time.now_s - self.used_at.get(name, -1e12) <= self.lifetime_s and hit == stop - BLOCK:
                hit = stop
            self.used_at[name] = self.time.now_s
        self.hit = min(hit + self.claims_tokens, (len(tokens) - 1) // BLOCK * BLOCK)
        digest = sum(tokens) % 1000
        said = f"answer {digest}" if not (self.changes_answers and self.hit) else f"other answer {digest}"
        self.say = lambda prompt: said
        async for piece in super().run(generation, timeout_s):
            yield piece
