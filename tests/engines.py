"""A worker in this process: a small random model, a real pool, and a store in memory that can be told to fail."""

from pathlib import Path

import numpy as np
import torch

from antefix.errors import Unavailable
from antefix.events.block_events import BlockEvent, EventKind
from antefix.events.numbered_log import Batch, Cursor
from antefix.miss_reason import MissReason
from antefix.model import BlockPool, load_model
from antefix.model_dir import identify
from antefix.record import BlockFate, LookupResult, PutResult, RecordKind
from antefix.secret import Keyring
from antefix.store.store_stats import KindTotals, StoreTotals
from antefix.window import Rates, RestorePlanner, Sizes, parse
from antefix.window.rates import RatePriors
from antefix_prefill.restore import Prompt
from antefix_prefill.worker.compute_thread import ComputeThread
from antefix_prefill.worker.engine import Engine
from antefix_prefill.worker.resident_blocks import ResidentBlocks
from tests.small_worker_model import small_worker_model

MODEL = Path(__file__).parents[1] / "models" / "antefix-tiny"


class FixedRates(Rates):
    """Rates that never change: on a busy machine, learnt rates would make the planner choose a different plan."""

    def observe_prefill(self, tokens, *, context, seconds):
        pass

    def observe_replay(self, tokens, *, context, seconds):
        pass

    def observe_load(self, tier, nbytes, seconds):
        pass


class MemoryStore:
    """An `antefix.store.api.Store` over a dict. `broken` names the calls that fail now."""

    def __init__(self):
        self.records = {}
        self.broken = set()
        self.puts = []
        self.rejected = []
        self.pins = []
        self.fates = {}

    def check(self, call):
        if call in self.broken:
            raise Unavailable(f"{call} is broken")

    async def lookup(self, chain, *, fingerprint, tenant=b""):
        self.check("lookup")
        num = 0
        while num < len(chain) and (RecordKind.BLOCK, chain[num]) in self.records:
            num += 1
        marks = [i + 1 for i in range(num) if (RecordKind.CHECKPOINT, chain[i]) in self.records]
        return LookupResult(num_blocks=num, checkpoints=tuple(marks))

    async def fate(self, hash, *, fingerprint):
        self.check("fate")
        stored = (RecordKind.BLOCK, hash) in self.records
        return BlockFate(reason=MissReason.NONE if stored else self.fates.get(hash, MissReason.FIRST_SEEN))

    async def get_blocks(self, hashes, into, *, fingerprint, tenant=b""):
        self.check("get_blocks")
        for index, (name, row) in enumerate(zip(hashes, into, strict=True)):
            payload = self.records.get((RecordKind.BLOCK, name))
            if payload is None:
                return index
            row[:] = payload
        return len(hashes)

    async def get(self, kind, hash, *, fingerprint, tenant=b""):
        self.check("get")
        return self.records.get((kind, hash))

    async def put(self, records):
        self.check("put")
        for record in records:
            self.records[record.kind, record.hash] = bytes(record.payload)
            self.puts.append((record.kind, record.position))
        return PutResult(num_stored=len(records), num_existing=0)

    async def reject(self, kind, hashes):
        for block_hash in hashes:
            self.records.pop((kind, block_hash), None)
            self.rejected.append((kind, block_hash))

    async def register(self, fingerprint, layout, *, statement=b""):
        pass

    async def pin(self, names, *, duration_s, owner):
        self.check("pin")
        self.pins.append((list(names), duration_s, owner))
        return sum(name in self.records for name in names)

    async def evict(self, names, *, owner):
        return sum(self.records.pop(name, None) is not None for name in names)

    async def watch(self, cursor=None):
        names = [name for kind, name in self.records if kind is RecordKind.BLOCK]
        event = BlockEvent.of(EventKind.STORED, names, b"")
        yield Batch(cursor=Cursor(epoch=b"e"), events=(event,), snapshot=True, snapshot_begins=True, snapshot_ends=True)

    async def stats(self):
        kinds = {}
        for kind in RecordKind:
            sizes = [len(payload) for name, payload in self.records.items() if name[0] is kind]
            kinds[kind] = KindTotals(num_records=len(sizes), stored_bytes=sum(sizes), payload_bytes=sum(sizes))
        return StoreTotals(kinds=kinds)

    async def close(self):
        pass


def load(kv_format, path=None):
    torch.set_num_threads(1)  # two threads on a busy machine wait for each other; the bits are the same
    return load_model(path or small_worker_model(), kv_format=kv_format)


def build(model, store, *, strategy, num_blocks, prefill_chunk, priors=None, path=None):
    """An engine over a loaded model. By default any hit is cheaper than cold, so stored records decide the plan."""
    identity = identify(path or small_worker_model(), revision="test")
    kv_format = model.layout.kv_format
    pool = BlockPool(model.layout, num_blocks)
    rates = FixedRates(priors or RatePriors(prefill_tokens_per_s=200, load_bytes_per_s=1e12, load_fixed_s=1e-9))
    return Engine(
        identity=identity,
        model=model,
        pool=pool,
        blocks=ResidentBlocks(pool),
        store=store,
        strategy=parse(strategy),
        planner=RestorePlanner(Sizes.of(model.layout), rates),
        keyring=Keyring(b"0123456789abcdef"),
        compute=ComputeThread("test"),
        prefill_chunk=prefill_chunk,
        fingerprint=identity.fingerprint(kv_format).digest,
    )


def prompt_of(engine, tokens, tenant=""):
    chain = engine.chain(tenant)
    chain.extend(np.asarray(tokens, np.uint32))
    return Prompt(tokens=np.asarray(tokens, np.uint32), chain=chain, tenant=tenant)
