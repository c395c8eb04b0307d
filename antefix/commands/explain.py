"""`antefix explain`: why a prompt hits or misses, from the store's directory; no service needs to run."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from antefix.block import chain_of, exactness_of
from antefix.clients import PrefillClient, Tokens
from antefix.commands.up import DEFAULT_MODEL
from antefix.errors import InvalidRequest
from antefix.explain.answer import Explanation, explain
from antefix.explain.evidence import Names, gather
from antefix.explain.text import lines
from antefix.layout import KVFormat
from antefix.model_dir import ModelIdentity, identify
from antefix.secret import Keyring
from antefix.tokenizer import load_tokenizer
from antefix.window import RatePriors, Rates, RestorePlanner, Sizes

_FORMATS = (KVFormat.FP8, KVFormat.FLOAT32)
# Exactness that a namespace may have had before; a miss is explained when the tokens are stored under one of these.
_BOUNDED_TRIED = (0, 1, 2, 4)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT", help="the prompt")
    prompt.add_argument("--prompt-file", type=Path, metavar="FILE", help="file with the prompt; - reads stdin")
    prompt.add_argument("--tokens-file", type=Path, metavar="FILE", help="JSON list of token ids; - reads stdin")
    parser.add_argument("--data-dir", type=Path, help="of `antefix up`: has the store, the secret and the store's log")
    parser.add_argument("--store-dir", type=Path, help="the store's directory, where it is not in --data-dir")
    parser.add_argument("--secret-file", type=Path, help="the deployment's secret, where it is not in --data-dir")
    parser.add_argument("--store-log", type=Path, help="the store's log: tells evicted blocks from those never seen")
    parser.add_argument("--model", type=Path, default=DEFAULT_MODEL, help="model directory (default: the shipped one)")
    parser.add_argument("--kv-format", choices=[f.value for f in _FORMATS], default="fp8", help="default: fp8")
    parser.add_argument("--namespace", default="default", help="default: default")
    parser.add_argument("--bounded-windows", type=int, default=0, metavar="K", help="as the workers have it")
    parser.add_argument("--tenant", default="", help="whose prompt it is")
    parser.add_argument("--user", default="", help="the tenant's end user, if requests name one")
    parser.add_argument("--check", action="store_true", help="read all stored blocks and verify their checksums")
    parser.add_argument("--worker", metavar="HOST:PORT", help="take the prefill speed from this running prefill worker")
    parser.add_argument(
        "--prefill-rate",
        type=float,
        metavar="N",
        help="prefill tokens per second to predict with, if no worker is asked",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object, with every block")


def run(args: argparse.Namespace) -> int:
    identity = identify(args.model)
    tokens = _tokens(args)
    if len(tokens) == 0:
        raise InvalidRequest("the prompt is empty")
    if int(tokens.max()) >= identity.vocab_size:
        raise InvalidRequest(f"token id {int(tokens.max())} is outside the vocabulary of {identity.vocab_size}")
    explanation = _explain(args, identity, tokens)
    if args.json:
        print(json.dumps(explanation.as_dict()))
    else:
        for line in lines(explanation):
            print(line)
    return 0


def _explain(args: argparse.Namespace, identity: ModelIdentity, tokens: Tokens) -> Explanation:
    kv_format = KVFormat(args.kv_format)
    keyring = Keyring.from_file(_path(args, "secret_file", "secret"))
    tenant = f"{args.tenant}\x1f{args.user}" if args.user else args.tenant

    def names(kv_format: KVFormat, bounded_windows: int) -> Names:
        exactness = exactness_of(bounded_windows)
        digest = identity.fingerprint(kv_format, namespace=args.namespace, exactness=exactness).digest
        chain = chain_of(
            tokens,
            fingerprint_digest=digest,
            key=keyring.key(tenant),
            block_size=identity.geometry.block_size,
        )
        label = f"kv_format {kv_format.value}, {exactness}"
        return Names(label=label, fingerprint=digest, hashes=chain.hashes)

    wanted = (kv_format, args.bounded_windows)
    others = [names(f, k) for f in _FORMATS for k in _BOUNDED_TRIED if (f, k) != wanted]
    blocks = gather(_path(args, "store_dir", "store"), names(*wanted), others, log=_log(args), check=args.check)
    planner = RestorePlanner(Sizes.of(identity.layout(kv_format)), Rates(_priors(args)))
    return explain(len(tokens), blocks, planner, bounded_windows=args.bounded_windows)


def _path(args: argparse.Namespace, name: str, within: str) -> Path:
    given: Path | None = getattr(args, name)
    if given is not None:
        return given
    if args.data_dir is None:
        raise InvalidRequest(f"say where the store is: --data-dir, or --{name.replace('_', '-')}")
    return Path(args.data_dir / within)


def _log(args: argparse.Namespace) -> Path | None:
    given: Path | None = args.store_log
    if given is None and args.data_dir is not None:
        given = args.data_dir / "usage-log"
    return given if given is not None and given.is_dir() else None


def _priors(args: argparse.Namespace) -> RatePriors:
    rate = args.prefill_rate
    if args.worker:
        rate = asyncio.run(PrefillClient(args.worker).status()).prefill_tokens_per_s
    return RatePriors() if not rate else RatePriors(prefill_tokens_per_s=rate)


def _tokens(args: argparse.Namespace) -> Tokens:
    if args.tokens_file is not None:
        ids = json.loads(_read(args.tokens_file))
        if not isinstance(ids, list) or not all(isinstance(i, int) and 0 <= i < 1 << 32 for i in ids):
            raise InvalidRequest("--tokens-file must hold a JSON list of token ids")
        return np.array(ids, np.uint32)
    text = args.prompt if args.prompt is not None else _read(args.prompt_file)
    ids_of_text: Sequence[int] = load_tokenizer(args.model).encode(text)
    return np.array(ids_of_text, np.uint32)


def _read(path: Path) -> str:
    try:
        return sys.stdin.read() if str(path) == "-" else path.read_text()
    except (OSError, UnicodeDecodeError) as err:
        raise InvalidRequest(f"{path} cannot be read: {err}") from err
