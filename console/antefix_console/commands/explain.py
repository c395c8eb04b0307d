"""`antefix explain`: why a prompt hits or misses. The command reads the deployment's directory, without any running
service; only `--fleet` asks a running router.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from antefix.block import (
    CPU_FLOAT32,
    Fingerprint,
    HashKind,
    chain_of,
    check_arithmetic,
    differing_fields,
    digest_of,
    exactness_of,
    fields_of,
    hash_kind_of,
)
from antefix.cache_tenant import join_tenant, split_tenant
from antefix.checked_files import read_text
from antefix.clients import PrefillClient, Tokens
from antefix.config import add_flags, given_flags
from antefix.errors import AntefixError, InvalidRequest
from antefix.layout import KVFormat
from antefix.miss_reason import MissReason
from antefix.model_dir import ModelIdentity, identify
from antefix.secret import Keyring
from antefix.store.remote_store import RemoteStore
from antefix.store_files.record_format import STORE_FILE
from antefix.text_table import visible
from antefix.window import RatePriors, Rates, RestorePlanner, Sizes, check_bounded
from antefix.window_pool import DISK, MEMORY, open_window_pool
from antefix.worker_settings import NAMING, WorkerSettings
from antefix_console import shipped
from antefix_console.commands import explain_fleet, explain_requests
from antefix_console.deployment import ARITHMETIC_FILE
from antefix_console.explain.answer import Explanation, explain
from antefix_console.explain.block_evidence import NamedChain, gather, holdings, statements
from antefix_console.explain.object_evidence import in_object_tier
from antefix_console.explain.text import lines
from antefix_console.operator_credentials import hold_grant
from antefix_console.progress_line import ProgressLine

_FORMATS = (KVFormat.FP8, KVFormat.FLOAT32)
# Exactness settings that a namespace may have had before. A miss is explained if the tokens are stored under one of
# them.
_BOUNDED_TRIED = range(9)
# The workers' settings that tell where their KV is.
_SETTINGS = (*NAMING, "window_pool", "redis_password_file", "redis_ca_file")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT", help="the prompt")
    prompt.add_argument("--prompt-file", type=Path, metavar="FILE", help="file with the prompt (-: standard input)")
    prompt.add_argument(
        "--tokens-file", type=Path, metavar="FILE", help="file with a JSON list of token ids (-: standard input)"
    )
    explain_requests.add_arguments(parser, prompt)
    explain_fleet.add_arguments(parser, prompt)
    parser.add_argument(
        "--data-dir",
        type=Path,
        help="data directory of `antefix up`, which has the store, the secret and the store's log",
    )
    parser.add_argument(
        "--store-dir",
        type=Path,
        nargs="+",
        metavar="DIR",
        help="directories of the stores, if they are not in --data-dir",
    )
    parser.add_argument(
        "--object-store", default="", metavar="URL", help="URL of the object store behind the stores, if there is one"
    )
    parser.add_argument("--secret-file", type=Path, help="file with the deployment's secret, if not in --data-dir")
    parser.add_argument(
        "--store-log",
        type=Path,
        nargs="+",
        metavar="DIR",
        help="directories of the stores' logs; the logs tell evicted blocks from blocks that were never stored",
    )
    parser.add_argument("--model", type=Path, default=shipped.MODEL, help="model directory (default: the shipped one)")
    add_flags(parser.add_argument_group("as the workers have them"), WorkerSettings, _SETTINGS)
    parser.add_argument(
        "--arithmetic",
        metavar="NAME",
        help="arithmetic of the workers, as named by `antefix doctor` (default: as found by the last `antefix up`)",
    )
    parser.add_argument(
        "--tenant", default="", help="tenant that the prompt belongs to (default: no tenant, as without API keys)"
    )
    parser.add_argument("--user", default="", help="the tenant's end user, if the requests name one")
    _add_other_places(parser)
    parser.add_argument(
        "--store-address", metavar="HOST:PORT", help="address of the store service, needed with --window-pool memory"
    )
    parser.add_argument("--check", action="store_true", help="read all stored blocks and verify their checksums")
    parser.add_argument(
        "--worker", metavar="HOST:PORT", help="use the prefill speed that this running prefill worker reports"
    )
    parser.add_argument(
        "--prefill-rate",
        type=float,
        metavar="N",
        help="prefill speed for predictions in tokens per second, if --worker is not given",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object that has every block")


def _add_other_places(parser: argparse.ArgumentParser) -> None:
    """Flags that name where else to look for the prompt's blocks."""
    parser.add_argument(
        "--also-namespace",
        action="append",
        default=[],
        metavar="NAME",
        help="also search this namespace; may be repeated",
    )
    parser.add_argument(
        "--also-tenant",
        action="append",
        default=[],
        metavar="NAME",
        help="also search the blocks of this tenant; may be repeated",
    )
    parser.add_argument(
        "--also-model",
        action="append",
        default=[],
        type=Path,
        metavar="DIR",
        help="also search the blocks of this model; may be repeated",
    )


def run(args: argparse.Namespace) -> int:
    if args.fleet:
        return explain_fleet.run(args)
    if args.workers:
        raise InvalidRequest("--workers needs --fleet, the address of the router that has the workers")
    with ProgressLine("reading the model"):
        identity = identify(args.model)
    secret = args.secret_file or (args.data_dir / "secret" if args.data_dir else None)
    keyring = Keyring.from_file(secret) if secret is not None else None
    if args.request_id is not None:
        return explain_requests.explain_request(args, identity, keyring)
    prompt = explain_requests.given_prompt(args, identity, keyring)
    tokens = prompt.source.tokens
    if len(tokens) == 0:
        raise InvalidRequest("the prompt is empty")
    if int(tokens.max()) >= identity.vocab_size:
        raise InvalidRequest(f"token id {int(tokens.max())} is outside the vocabulary of {identity.vocab_size}")
    if args.against is not None:
        return explain_requests.compare_with(args, prompt, identity, keyring)
    args.user = args.user or prompt.user
    with ProgressLine("reading the store"):
        explanation = _explain(args, identity, np.asarray(tokens))
    if args.json:
        print(json.dumps({**explanation.as_dict(), **prompt.facts}))
    else:
        for line in (*prompt.lines, *lines(explanation)):
            print(line)
    return 0


def _explain(args: argparse.Namespace, identity: ModelIdentity, tokens: Tokens) -> Explanation:
    worker = WorkerSettings(**given_flags(WorkerSettings, args))
    check_bounded(worker.bounded_windows, identity.geometry)
    keyring = Keyring.from_file(_path(args, "secret_file", "secret"))
    mine = Whose(identity=identity, kv_format=KVFormat(worker.kv_format), namespace=worker.namespace,
                 tenant=_tenant(args, args.tenant), bounded_windows=worker.bounded_windows,
                 arithmetic=_arithmetic(args))  # fmt: skip
    names = mine.names(tokens, keyring)
    # 1. What the store's files contain.
    directories = _stores(args)
    asked = [other.names(tokens, keyring, differs=label) for other, label in _asked(args, mine)]
    tried = [other.names(tokens, keyring, differs=label) for other, label in _tried(mine)]
    for directory in directories:
        tried += _stated(directory, mine, tokens, keyring)
    more = {args.object_store: asyncio.run(in_object_tier(args.object_store, names))} if args.object_store else {}
    blocks = gather(directories, names, [*asked, *tried], more=more, log=_logs(args), check=args.check)
    # 2. What the window pool contains.
    stored = sum(1 for _ in itertools.takewhile(lambda block: block.reason is MissReason.NONE, blocks))
    hold_grant(args.store_address or "", mine.tenant, tokens)
    pooled, pool_error = asyncio.run(_pooled(worker, args.store_address, names, stored))
    # 3. How a worker would restore it.
    planner = RestorePlanner(Sizes.of(identity.layout(mine.kv_format)), Rates(_priors(args)))
    return explain(
        len(tokens),
        blocks,
        planner,
        bounded_windows=worker.bounded_windows,
        pooled=pooled,
        pool_error=pool_error,
        holdings=holdings(directories, names.fingerprint),
        asked=[other.label for other in asked],
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Whose:
    """All settings that block names depend on, except the tokens and the deployment's secret."""

    identity: ModelIdentity
    kv_format: KVFormat
    namespace: str
    tenant: str
    bounded_windows: int
    arithmetic: str

    @property
    def fingerprint(self) -> Fingerprint:
        return self.identity.fingerprint(
            self.kv_format,
            namespace=self.namespace,
            exactness=exactness_of(self.bounded_windows),
            arithmetic=self.arithmetic,
        )

    def names(self, tokens: Tokens, keyring: Keyring, differs: str = "") -> NamedChain:
        return self.names_under(self.fingerprint.statement, tokens, keyring, differs)

    def names_under(self, statement: bytes, tokens: Tokens, keyring: Keyring, differs: str) -> NamedChain:
        """The block names of these tokens for the same tenant under another known fingerprint with blocks of the same
        size.
        """
        digest, kind = digest_of(statement), hash_kind_of(statement)
        if kind is None:
            raise InvalidRequest(f"this version cannot compute the names of fingerprint {digest.hex()}")
        chain = chain_of(
            tokens,
            fingerprint_digest=digest,
            key=keyring.key(self.tenant),
            block_size=self.identity.geometry.block_size,
            kind=kind,
        )
        return NamedChain(label=differs, fingerprint=digest, hashes=chain.hashes)


def _tried(mine: Whose) -> Iterator[tuple[Whose, str]]:
    """Other names under which the same tokens may be stored by mistake, and the setting that differs."""
    for kv_format in _FORMATS:
        for windows in _BOUNDED_TRIED:
            if (kv_format, windows) != (mine.kv_format, mine.bounded_windows):
                label = f"kv_format {kv_format.value}, {exactness_of(windows)}"
                yield replace(mine, kv_format=kv_format, bounded_windows=windows), label


def _stated(directory: Path, mine: Whose, tokens: Tokens, keyring: Keyring) -> Iterator[NamedChain]:
    """Names under the store's other fingerprints of this geometry, and the fields in which these differ."""
    own = mine.fingerprint.statement
    for statement in statements(directory).values():
        fields = differing_fields(own, statement)
        # Names that an engine or a later version makes cannot be computed from tokens here.
        is_named_by_tokens = hash_kind_of(statement) not in (None, HashKind.ENGINE_KEY)
        if fields and "geometry" not in fields and is_named_by_tokens:
            said = fields_of(statement)
            label = ", ".join(f"{name} {said.get(name)}" for name in fields)
            names = mine.names_under(statement, tokens, keyring, label)
            yield replace(names, reason=MissReason.ARITHMETIC_DIFFERS) if fields == ("arithmetic",) else names


def _arithmetic(args: argparse.Namespace) -> str:
    if args.arithmetic:
        return check_arithmetic(args.arithmetic)
    file = args.data_dir / ARITHMETIC_FILE if args.data_dir else None
    if file is None or not file.is_file():
        return CPU_FLOAT32
    return check_arithmetic(read_text(file, "arithmetic of the last start").strip())


def _asked(args: argparse.Namespace, mine: Whose) -> Iterator[tuple[Whose, str]]:
    """Other names that the caller asks about, each with the setting that differs."""
    for namespace in args.also_namespace:
        yield replace(mine, namespace=namespace), f"namespace {namespace}"
    for tenant in args.also_tenant:
        yield replace(mine, tenant=_tenant(args, tenant)), _shown_tenant(args, tenant)
    for directory in args.also_model:
        identity = identify(directory)
        if identity.geometry.block_size != mine.identity.geometry.block_size:
            raise InvalidRequest(
                f"--also-model {directory}: blocks of this model have another size, so its KV cannot be the KV "
                "that you look for"
            )
        yield replace(mine, identity=identity), f"model {directory}"


def _tenant(args: argparse.Namespace, tenant: str) -> str:
    return join_tenant(tenant, args.user)


def _shown_tenant(args: argparse.Namespace, tenant: str) -> str:
    name, user = split_tenant(_tenant(args, tenant))
    shown = f"tenant {name}" if name else "no tenant"
    return visible(f"{shown}, user {user}" if user else shown)


async def _pooled(
    worker: WorkerSettings, store_address: str | None, names: NamedChain, num_stored: int
) -> tuple[tuple[int, ...] | None, str]:
    """The block boundary with a checkpoint in the window pool that is nearest to the end of the stored prefix, or None
    if there is no pool; and why a pool did not answer.
    """
    if worker.window_pool == DISK:
        return None, ""
    if worker.window_pool == MEMORY and not store_address:
        raise InvalidRequest(
            "the setting --window-pool memory keeps checkpoints in the store service: give its address with "
            "--store-address"
        )
    store = RemoteStore(store_address or "")
    pool = open_window_pool(
        worker.window_pool,
        store,
        bytes_max=1,
        password_file=worker.redis_password_file,
        ca_file=worker.redis_ca_file,
    )
    assert pool is not None
    try:
        found = await pool.nearest(list(reversed(names.hashes[:num_stored])), fingerprint=names.fingerprint)
    except AntefixError as err:
        return None, str(err)
    finally:
        await pool.close()
        await store.close()
    return (() if found is None else (num_stored - found.index,)), ""


def _path(args: argparse.Namespace, name: str, within: str) -> Path:
    given: Path | None = getattr(args, name)
    if given is not None:
        return given
    if args.data_dir is None:
        raise InvalidRequest(
            "say where the deployment's files are: give --data-dir, or both --store-dir and --secret-file"
        )
    return Path(args.data_dir / within)


def _stores(args: argparse.Namespace) -> list[Path]:
    """The store directories that are named, or all stores of a deployment that `antefix up` made."""
    if args.store_dir:
        return list(args.store_dir)
    first = _path(args, "store_dir", "store")
    return [first, *sorted(path for path in first.parent.glob("store-*") if (path / STORE_FILE).is_file())]


def _logs(args: argparse.Namespace) -> list[Path]:
    given: list[Path] = args.store_log or []
    if not given and args.data_dir is not None:
        given = [args.data_dir / "usage-log", *sorted(args.data_dir.glob("usage-log-*"))]
    return [path for path in given if path.is_dir()]


def _priors(args: argparse.Namespace) -> RatePriors:
    rate = args.prefill_rate
    if args.worker:
        rate = asyncio.run(_measured_rate(args.worker))
    if args.prefill_rate is not None and not 0 < args.prefill_rate < float("inf"):
        raise InvalidRequest(f"--prefill-rate must be above 0, is {args.prefill_rate}")
    return RatePriors() if not rate else RatePriors(prefill_tokens_per_s=rate)


async def _measured_rate(worker: str) -> float:
    # The client is made here, because a channel belongs to the event loop that runs when it is made.
    async with PrefillClient(worker) as client:
        return (await client.status()).prefill_tokens_per_s
