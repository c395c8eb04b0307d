"""A router with scripted workers: real HTTP, a real bill, made-up tokens.

Scripts give texts that the small model cannot.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from antefix.model_dir import ModelIdentity, identify
from antefix.restore_report import RestoreReport
from antefix.secret import Keyring
from antefix.tokenizer import load_tokenizer
from antefix.wire import TokenLogprob
from antefix_billing.key_register import KeyRegister
from antefix_billing.ledger import Ledger
from antefix_billing.ratecard import RateCards
from antefix_billing.receipt import Signer
from antefix_billing.tenants import TenantBook
from antefix_router.accounting import Accounts
from antefix_router.answers import RetryConfig
from antefix_router.front import Front
from antefix_router.gateway.app import start_http
from antefix_router.gateway.gateway_config import GatewayConfig
from antefix_router.generation import OutputPiece
from antefix_router.open_bill import Served

MODEL = Path(__file__).parents[2] / "models" / "antefix-tiny"


@dataclass
class Script:
    """Answers each request with `say(prompt text)`, byte by byte. `hit` tokens of each prompt count as hits.

    hold: the first token waits until this event is set.  fail_after: the number of tokens before `error` is raised.
    """

    say: Callable[[str], str] = lambda prompt: "yes"
    hit: int = 0
    hold: asyncio.Event | None = None
    pause_s: float = 0.0
    error: Exception | None = None
    fail_after: int = 0
    prompts: list[list[int]] = field(default_factory=list)
    requests: list = field(default_factory=list)
    generations: list = field(default_factory=list)
    num_cancelled: int = 0

    async def run(self, generation, timeout_s):
        """Give the outputs one after the other, if the request asks for several. Later outputs end in their number."""
        request = generation.request
        self.requests.append(request)
        self.generations.append(generation)
        self.prompts.append(request.tokens.tolist())
        try:
            if self.hold is not None:
                await self.hold.wait()
            hit = min(self.hit, len(request.tokens) - 1)
            generation.restore = RestoreReport(
                plan="checkpoint" if hit else "cold",
                hit_tokens=hit,
                miss_tokens=len(request.tokens) - hit,
                hit_store_tokens=hit,
                last_hit_hash=b"\xab" * 32 if hit else b"",
            )
            prompt = bytes(t for t in request.tokens.tolist() if t < 256).decode(errors="replace")
            for index, sample in enumerate(generation.samples):
                answer = list(self.say(prompt).encode()) + [ord(str(index))] * (index > 0)
                for number, token in enumerate(answer[: request.sampling.max_tokens]):
                    if self.error is not None and number == self.fail_after:
                        raise self.error
                    sample.emitted.append(token)
                    if (num_top := request.sampling.num_top_logprobs) is not None:
                        sample.logprobs.append(script_logprob(token, num_top))
                    yield OutputPiece(index, np.array([token], np.uint32))
                    if sample.is_ended:
                        break
                    await asyncio.sleep(self.pause_s)
                if self.error is not None and self.fail_after >= len(answer):
                    raise self.error
                is_cut = len(answer) > request.sampling.max_tokens and not sample.is_ended
                sample.finish_reason = "length" if is_cut else "stop"
        except (asyncio.CancelledError, GeneratorExit):
            self.num_cancelled += 1
            raise


def script_logprob(token: int, num_top: int) -> TokenLogprob:
    """A made-up log probability, different for each token. The likeliest token is the given one."""
    top = tuple(((token + index) % 256, -token / 1024 - index) for index in range(num_top))
    return TokenLogprob(logprob=-token / 1024, top=top)


@functools.cache
def _identity() -> ModelIdentity:
    """The weights are read for it."""
    return identify(MODEL, revision="test")


def make_front(
    script: Script,
    *,
    ledger: Path | None,
    cards: RateCards | None = None,
    tenants: TenantBook | None = None,
    retries: RetryConfig | None = None,
    keys: KeyRegister | None = None,
    signer: Signer | None = None,
):
    identity = _identity()
    tenants = tenants or TenantBook()
    accounts = Accounts(
        Ledger(ledger) if ledger is not None else None,
        served=Served(model=identity.name, revision="test", fingerprint="00"),
        keyring=Keyring(b"0" * 16),
        cards=cards or RateCards(),
        tenants=tenants,
        retries=retries,
    )
    return Front(
        script, accounts, identity=identity, tokenizer=load_tokenizer(MODEL), tenants=tenants, signer=signer, keys=keys
    )


@contextlib.asynccontextmanager
async def serving(front: Front, **settings) -> AsyncIterator[str]:
    """The gateway's base URL."""
    http = await start_http(front, GatewayConfig(http_address="127.0.0.1:0", **settings))
    try:
        yield f"http://{http.address}"
    finally:
        await http.stop()
        await front.close()
