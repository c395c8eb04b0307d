"""Stores blocks on disk from your own Python program, without a service: python examples/store_blocks.py DIRECTORY"""

import sys

import antefix_kvstore
from antefix import BlockingStore, Record, RecordKind, chain_of

MODEL, SECRET, BLOCK_SIZE = b"my model, version 1".ljust(32), b"the key of my block names", 128

with BlockingStore(antefix_kvstore.open(sys.argv[1], budget_bytes="1G")) as store:
    # A block's name depends on its tokens and all tokens before them, so an equal prompt finds the block again.
    chain = chain_of(range(1000), fingerprint_digest=MODEL, key=SECRET, block_size=BLOCK_SIZE)
    named = [(chain.hashes[i], chain.parent(i), (i + 1) * BLOCK_SIZE, bytes([i]) * 4096) for i in range(len(chain))]
    records = [
        Record(kind=RecordKind.BLOCK, hash=name, parent=parent, fingerprint=MODEL, position=end, payload=your_kv)
        for name, parent, end, your_kv in named
    ]
    done = store.put(records)

    num_blocks = store.lookup(chain.hashes, fingerprint=MODEL).num_blocks
    rows = [memoryview(bytearray(4096)) for _ in range(num_blocks)]
    num_good = store.get_blocks(chain.hashes[:num_blocks], rows, fingerprint=MODEL)
    print(f"{done.num_stored} blocks stored, {done.num_existing} were there, {num_good} restored,", end=" ")
    print("all equal" if rows == [record.payload for record in records] else "not equal")
