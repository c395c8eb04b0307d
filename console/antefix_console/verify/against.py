"""Compares workers of a running deployment: the same prompts, sent directly to each, run cold and with others' KV.

Every prompt is run under a tenant that is different for each worker, so nothing is hit. Then it is run under the first
worker's tenant, whose blocks are stored by then. Answers are sampled with a seed and have log probabilities, which must
be equal to the last bit. A prefill worker gives no answers: it leaves a handoff, and the first decode worker answers
from that.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from antefix.clients import DecodeClient, PrefillClient, RouterClient, Tokens
from antefix.errors import AntefixError, InvalidRequest
from antefix.generation_request import Caller, GenerationRequest
from antefix.restore_report import RestoreReport
from antefix.sampling import Sampling
from antefix.wire import TokenLogprob
from antefix_console.operator_credentials import hold_grant
from antefix_console.verify.served import ServedAnswer
from antefix_console.verify.verdict import Cases, Report

# A short prompt, one of some blocks of a small model, and one of some blocks of V4.
PROMPT_TOKENS = (33, 200, 521)
# Every vocabulary has so many token ids.
_NUM_IDS = 61
_OUTPUT_TOKENS = 12
_NUM_TOP = 5
_TEMPERATURE = 0.8
_TIMEOUT_S = 120.0
_ASK_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """One worker, with what it reports about itself."""

    address: str
    role: str
    fingerprint: bytes
    arithmetic: str
    setup: str

    @property
    def label(self) -> str:
        return f"{self.role} worker {self.address}"


async def compare_workers(addresses: Sequence[str], report: Report, *, seed: int) -> list[str]:
    """Add cases to the report. Returns lines that say what the cases show, and what they leave open.

    Raises:  InvalidRequest: fewer than two workers, or no decode worker among them.  AntefixError: one does not answer.
    """
    peers = await find_peers(addresses)
    decode = [peer for peer in peers if peer.role == "decode"]
    if len(peers) < 2 or not decode:
        found = ", ".join(peer.label for peer in peers) or "none"
        raise InvalidRequest(
            "--against needs two workers, at least one of them a decode worker, or a router that has such "
            f"workers; found: {found}"
        )
    first, others = decode[0], [peer for peer in peers if peer is not decode[0]]
    cases = Cases(report=report, subject=first.address, kv_format="as served")
    for other in others:
        _compare_names(first, other, cases)
    nonce, random = secrets.token_hex(8), np.random.default_rng(seed)
    hit_tokens = 0
    for number, num_tokens in enumerate(PROMPT_TOKENS):
        prompt = random.integers(0, _NUM_IDS, num_tokens).astype(np.uint32)
        tenants = [f"verify-{nonce}-{index}" for index in range(len(peers))]
        wanted, _ = await _ask(first, first, prompt, tenants[0], number)
        for tenant, other in zip(tenants[1:], others, strict=True):
            got, _ = await _ask(other, first, prompt, tenant, number)
            cases.add("against", f"{other.role}, cold", num_tokens, problem=_said(other, wanted, got))
            got, restored = await _ask(other, first, prompt, tenants[0], number)
            hit = restored.hit_tokens if restored else 0
            hit_tokens += hit
            plan = f"{other.role}, {restored.plan if restored else 'handoff'}"
            cases.add("against", plan, num_tokens, hit_tokens=hit, problem=_said(other, wanted, got))
    return _verdict(first, others, hit_tokens)


async def find_peers(addresses: Sequence[str]) -> list[Peer]:
    """The workers behind addresses of workers and routers, each once."""
    found: dict[str, Peer] = {}
    for address in addresses:
        for peer in await _peers_at(address):
            found.setdefault(peer.address, peer)
    return list(found.values())


async def _peers_at(address: str) -> list[Peer]:
    """The workers at an address: the worker itself, or all workers of a router.

    Raises:  AntefixError: neither a worker nor a router answers there.
    """
    problem: AntefixError | None = None
    for role, client in (("decode", DecodeClient), ("prefill", PrefillClient)):
        try:
            status = await client(address).status(timeout_s=_ASK_TIMEOUT_S)
        except AntefixError as err:
            problem = err
            continue
        return [
            Peer(
                address=address,
                role=role,
                fingerprint=status.fingerprint,
                arithmetic=status.arithmetic,
                setup=status.setup,
            )
        ]
    try:
        router = await RouterClient(address).status(timeout_s=_ASK_TIMEOUT_S)
    except AntefixError as err:
        raise AntefixError(f"{address} is neither a worker nor a router that answers: {err}") from problem
    peers = await asyncio.gather(*(_peers_at(worker.address) for worker in router.workers if worker.serving))
    return [peer for group in peers for peer in group]


def _compare_names(first: Peer, other: Peer, cases: Cases) -> None:
    problem = ""
    if first.fingerprint != other.fingerprint:
        problem = (
            f"{other.label} gives KV other names than {first.label}, so they share nothing;"
            f" {other.arithmetic or 'not said'} ({other.setup}) and {first.arithmetic or 'not said'} ({first.setup})"
        )
    elif first.arithmetic != other.arithmetic:
        problem = f"{other.label} computes {other.arithmetic}, {first.label} {first.arithmetic}, under one name"
    cases.add("against", "fingerprint", 0, problem=problem)


async def _ask(
    peer: Peer, decode: Peer, prompt: Tokens, tenant: str, seed: int
) -> tuple[ServedAnswer, RestoreReport | None]:
    """The answer that a worker gave, and how the worker restored the prompt."""
    sampling = Sampling(
        max_tokens=_OUTPUT_TOKENS, temperature=_TEMPERATURE, seed=seed, num_top_logprobs=_NUM_TOP, ignore_eos=True
    )
    caller = Caller(tenant=tenant, request_id=f"verify-{secrets.token_hex(8)}")
    request = GenerationRequest(tokens=prompt, sampling=sampling, caller=caller)
    handoff, restored, target = b"", None, peer
    hold_grant(peer.address, tenant, prompt)
    if peer.role == "prefill":
        prefilled = await PrefillClient(peer.address).prefill(request, timeout_s=_TIMEOUT_S)
        handoff, restored, target = prefilled.handoff, prefilled.restore, decode
        if not handoff:
            raise AntefixError(
                f"the worker {peer.label} could not pass on its state for decoding: its store did not accept the "
                "handoff"
            )
    tokens: list[int] = []
    logprobs: list[TokenLogprob] = []
    answer = DecodeClient(target.address).decode(request, sampling, handoff=handoff, emitted=(), timeout_s=_TIMEOUT_S)
    async for message in answer:
        tokens += [int(token) for token in message.tokens]
        logprobs += message.logprobs
        restored = restored or message.restore
    return ServedAnswer(tuple(tokens), tuple(logprobs)), restored


def _said(other: Peer, wanted: ServedAnswer, got: ServedAnswer) -> str:
    unlike = wanted.unlike(got)
    return unlike and f"{other.label}: {unlike}"


def _verdict(first: Peer, others: Sequence[Peer], hit_tokens: int) -> list[str]:
    """Lines that say what was compared, and what remains open."""
    names = ", ".join(peer.label for peer in others)
    lengths = ", ".join(map(str, PROMPT_TOKENS))
    return [
        f"Compared {first.label} with {names}: fingerprints, arithmetic, and {_OUTPUT_TOKENS} output tokens with the"
        f" {_NUM_TOP} likeliest log probabilities (float32) after prompts of {lengths} tokens, each cold and with the"
        f" first worker's KV in the store ({hit_tokens} tokens of it were hit).",
        "Equal answers do not prove: other prompts, lengths or loads; KV and window state themselves, of which only"
        " answers are seen; workers that were not asked. A prefill worker is seen through the first decode worker.",
        *(["Nothing was hit: whether they can use each other's KV was not tried."] if not hit_tokens else []),
    ]
