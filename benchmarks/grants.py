"""What does authentication cost? Measures signing and checking grants, proving a service, and a whole small call.

Times are processor microseconds, so that they are nearly the same on a busy machine. A call's time includes client and
server, which run in one process.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from antefix import rpc
from antefix.secret import Keyring
from antefix.security.certificates import issue, make_ca
from antefix.security.credential_files import CredentialFiles
from antefix.security.grants import GrantCheck, Granter, secret_keys
from antefix.security.identity import Role
from antefix.security.process_security import OPEN, ProcessSecurity
from antefix.security.service_tokens import check_service_token, service_token
from benchmarks.run_record import write

METHOD = "/grpc.health.v1.Health/Check"
PROMPT = np.arange(2000, dtype=np.uint32)


def spent_us(work: Callable[[], object], num_times: int) -> float:
    started = time.process_time()
    for _ in range(num_times):
        work()
    return round((time.process_time() - started) / num_times * 1e6, 2)


async def call_us(serving: ProcessSecurity, calling: ProcessSecurity, num_times: int) -> float:
    """Processor microseconds of a health check, with calls one after the other over one connection."""
    server = await rpc.start_server("127.0.0.1:0", lambda _: None, [], security=serving)
    credentials = None if calling is OPEN else calling.credentials
    async with rpc.channel(server.address, of=Role.KVSTORE, credentials=credentials) as channel:
        check = channel.unary_unary(METHOD)
        await check(b"", timeout=10)
        started = time.process_time()
        for _ in range(num_times):
            await check(b"", timeout=10)
        spent = (time.process_time() - started) / num_times * 1e6
    await server.drain(0)
    return round(spent, 1)


async def measure(num_times: int) -> dict[str, object]:
    keyring = Keyring(b"a secret for measurements only !")
    granter, keys = Granter.from_secret(keyring), secret_keys(keyring)
    check = GrantCheck(lambda: keys)
    grant = granter.grant_for(keyring, "tenant", PROMPT, ttl_s=3600)
    token = service_token(keyring, Role.ROUTER, METHOD)
    report: dict[str, object] = {
        "grant_bytes": len(grant),
        "sign_us": spent_us(lambda: granter.grant_for(keyring, "tenant", PROMPT, ttl_s=3600), num_times),
        "check_first_us": spent_us(lambda: GrantCheck(lambda: keys).check(grant), num_times),
        "check_again_us": spent_us(lambda: check.check(grant), 10 * num_times),
        "prove_us": spent_us(lambda: service_token(keyring, Role.ROUTER, METHOD), num_times),
        "check_proof_us": spent_us(lambda: check_service_token(keyring, token, METHOD), num_times),
    }
    with tempfile.TemporaryDirectory() as directory:
        ca = Path(directory) / "ca"
        make_ca(ca)
        issue(ca, Path(directory) / "store", Role.KVSTORE, "s1")
        issue(ca, Path(directory) / "router", Role.ROUTER, "r1")
        kinds = {
            "open": (OPEN, OPEN),
            "secret": (ProcessSecurity(Role.KVSTORE, keyring=keyring), ProcessSecurity(Role.ROUTER, keyring=keyring)),
            "tls": (
                ProcessSecurity(Role.KVSTORE, files=CredentialFiles(Path(directory) / "store")),
                ProcessSecurity(Role.ROUTER, files=CredentialFiles(Path(directory) / "router")),
            ),
        }
        report["call_us"] = {name: await call_us(*sides, num_times) for name, sides in kinds.items()}
    return report


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=2000, help="repetitions of each operation")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to this file")
    args = parser.parse_args()
    figures = asyncio.run(measure(args.times))
    print(json.dumps(figures, indent=2))
    if args.json is not None:
        write(args.json, {"figures": figures})
