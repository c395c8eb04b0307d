"""Checks that a worker does not mix up pool rows, names or handoffs.

Each check adds its cases to a report, and no check depends on another one.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import replace

import numpy as np

from antefix.clients import Tokens
from antefix.layout import KVFormat
from antefix.record import RecordKind
from antefix.store.api import Store
from antefix.store.many_stores import ManyStores
from antefix.window import PlanKind
from antefix_console.verify.compare import compare
from antefix_console.verify.paired_runs import WorkerPair, prompt_of, run, run_cold
from antefix_console.verify.stores import MemoryStore
from antefix_console.verify.verdict import Cases
from antefix_decode.adopt import take_handoff
from antefix_prefill.leave_handoff import leave_handoff
from antefix_prefill.run_prompt import run_prompt


async def check_reused_rows(workers: WorkerPair, prompts: Many[Tokens], cases: Cases, *, bound: float) -> None:
    """Run prompts in turn through one worker whose pool has room for little more than one prompt. Rows are reused,
    blocks are evicted, and prompts that come again are restored from the store or from memory.
    """
    size = workers.subject.block_size
    num_blocks = max(-(-len(tokens) // size) for tokens in prompts) + 1
    cold = [await run_cold(workers, tokens) for tokens in prompts]
    worker = workers.new(MemoryStore(), num_blocks * size, kind=PlanKind.REPLAY)
    for turn, number in enumerate((*range(len(prompts)), *range(len(prompts)), 0)):
        restored = await run(worker, prompts[number])
        found = compare(cold[number], restored.outcome)
        problem = "" if found.identical or bound else f"prompt {turn + 1} in a pool of reused rows: {found.where}"
        cases.add(
            "reused rows",
            restored.plan,
            len(prompts[number]),
            found,
            hit_tokens=restored.hit_tokens,
            bound=bound,
            problem=problem,
        )


async def check_names(workers: WorkerPair, store: Store, tokens: Tokens, strategies: Many[str], cases: Cases) -> None:
    """Check that a record that is stored under one name is found under no other fingerprint and for no other tenant.

    With several stores and an object tier, only what they deliver counts: their answers to lookups are hints, and an
    object tier's index has hashes only, which include the fingerprint.
    strategies: namespaces under which the prompt was stored.
    """
    is_hint = isinstance(store, ManyStores)
    engines = [workers.new(store, len(tokens), strategy=strategy) for strategy in strategies]
    prompts = [prompt_of(engine, tokens) for engine in engines]
    for engine, prompt in zip(engines, prompts, strict=True):
        hashes = prompt.chain.hashes
        own = await store.lookup(hashes, fingerprint=engine.fingerprint)
        for other, others_prompt in zip(engines, prompts, strict=True):
            if other is engine:
                continue
            found = await store.lookup(hashes, fingerprint=other.fingerprint)
            room = [memoryview(bytearray(engine.layout.block_bytes)) for _ in hashes[:2]]
            num_read = await store.get_blocks(hashes[:2], room, fingerprint=other.fingerprint)
            windows = [
                await store.get(RecordKind.CHECKPOINT, hashes[block - 1], fingerprint=other.fingerprint)
                for block in own.checkpoints[-1:]
            ]
            problems = [
                f"{found.num_blocks} blocks of another fingerprint were found" * bool(found.num_blocks and not is_hint),
                f"{num_read} blocks of another fingerprint were returned" * bool(num_read),
                "a checkpoint of another fingerprint was returned" * any(data is not None for data in windows),
                "two fingerprints give blocks one name" * bool(set(hashes) & set(others_prompt.chain.hashes)),
            ]
            cases.add("names", "another's", len(tokens), problem="; ".join(filter(None, problems)))
        strangers = engine.chain("another tenant")
        strangers.extend(tokens)
        shared = bool(set(hashes) & set(strangers.hashes))
        cases.add("names", "another tenant's", len(tokens), problem="two tenants' blocks have one name" * shared)


def check_fingerprints(workers: WorkerPair, cases: Cases) -> None:
    """Check that everything that changes bits changes the fingerprint: weights, geometry, format, tokenizer, exactness,
    arithmetic, number of GPUs, namespace.
    """
    subject = workers.subject
    identity, own = subject.identity, subject.kv_format
    plain = identity.fingerprint(own).digest
    geometry = replace(identity.geometry, window=identity.geometry.window + 1)
    others = {
        "weights": replace(identity, weights_revision="others").fingerprint(own),
        "geometry": replace(identity, geometry=geometry).fingerprint(own),
        "tokenizer": replace(identity, tokenizer_revision="others").fingerprint(own),
        "KV format": identity.fingerprint(KVFormat.FLOAT64),
        "exactness": identity.fingerprint(own, exactness="bounded-1"),
        "arithmetic": identity.fingerprint(own, arithmetic="cpu-bfloat16"),
        "number of cards": identity.fingerprint(own, num_cards=2),
        "namespace": identity.fingerprint(own, namespace="others"),
    }
    for name, other in others.items():
        problem = f"other {name}, but the same fingerprint" if other.digest == plain else ""
        cases.add("names", "fingerprint", 0, problem=problem)


async def check_foreign_handoff(workers: WorkerPair, store: Store, tokens: Tokens, other: Tokens, cases: Cases) -> None:
    """Check that a handoff left for another prompt of the same length is refused."""
    prefill = workers.new(store, len(other))
    computed = await run_prompt(prefill, prompt_of(prefill, other))
    name = await leave_handoff(prefill, computed)
    prefill.blocks.release(computed.sequence.block_table)
    decode = workers.new(store, len(tokens) + 1)
    own = await take_handoff(decode, prompt_of(decode, other), name)
    foreign = await take_handoff(decode, prompt_of(decode, tokens), name)
    problem = "a handoff of another prompt was taken" if foreign is not None else ""
    problem = problem or ("the handoff of this very prompt was refused" if own is None else "")
    cases.add("handoff", "another's", len(tokens), problem=problem)


def any_tokens(random: np.random.Generator, vocab_size: int, num_tokens: int) -> Tokens:
    # Ids below 61 exist in every model here; the shipped model's special tokens are above 256.
    return random.integers(0, min(vocab_size, 256), num_tokens).astype(np.uint32)
