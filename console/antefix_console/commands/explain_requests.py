"""`antefix explain` for requests: a request body rendered as the gateway does, a ledger record, or two to compare."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from antefix import checked_files
from antefix.block import USER_SEPARATOR, HashKind, chain_of
from antefix.checked_files import parse_json
from antefix.checked_table import Table
from antefix.clients import Tokens
from antefix.errors import ConfigError, InvalidRequest
from antefix.model_dir import ModelIdentity
from antefix.prompt_marks import block_size_of, parting, parting_of_chain
from antefix.secret import Keyring
from antefix.tokenizer import load_tokenizer
from antefix_billing.usage_record import UsageRecord
from antefix_console.commands.prompt_text import given_text, read_text
from antefix_console.deployment import DOOR_FILE
from antefix_console.explain.compare_prompts import (
    RoughComparison,
    compare,
    comparison_lines,
    rough_lines,
)
from antefix_console.explain.prompt_source import SourcedPrompt
from antefix_console.explain.recorded_requests import (
    comparable,
    find_record,
    nearest_before,
    record_dict,
    record_lines,
)
from antefix_console.progress_line import ProgressLine
from antefix_router.chat.render import TextSpan
from antefix_router.gateway.dry_run import APIS, dry_run
from antefix_router.gateway.gateway_config import GatewayConfig

_DOOR_SETTINGS = ("chat_format", "model_aliases", "prefix_rules")
# Far more than the three settings take.
_DOOR_BYTES_MAX = 1 << 20


def add_arguments(parser: argparse.ArgumentParser, prompt: argparse._MutuallyExclusiveGroup) -> None:
    """prompt: the group of flags that name a prompt."""
    prompt.add_argument(
        "--messages", metavar="FILE", help="JSON file with a request's body or messages, as a client sends them"
    )
    prompt.add_argument(
        "--request-id",
        metavar="ID",
        help=(
            "explain this request of the ledger: which part of its prompt hit, and which earlier request is most "
            "similar"
        ),
    )
    parser.add_argument(
        "--against",
        metavar="FILE|ID",
        help=(
            "another request, as a JSON file or by its id; shows where the two prompts begin to differ, and which "
            "line causes the difference"
        ),
    )
    parser.add_argument(
        "--api", choices=APIS, default="chat", help="API whose format the JSON files have (default: chat)"
    )
    parser.add_argument(
        "--chat-format",
        help="format in which the router writes conversations (default: that of the last `antefix up`, or auto)",
    )
    parser.add_argument(
        "--model-aliases",
        metavar="FILE",
        help="file of model aliases that the router uses (default: that of the last `antefix up`)",
    )
    parser.add_argument(
        "--prefix-rules",
        metavar="FILE",
        help="file of prefix rules that the router uses (default: that of the last `antefix up`)",
    )
    parser.add_argument(
        "--ledger",
        type=Path,
        nargs="+",
        metavar="DIR",
        help="directories of the ledgers, if they are not in --data-dir",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class GivenPrompt:
    """facts: what else the gateway derived from the request, both as text and as JSON."""

    source: SourcedPrompt
    user: str = ""
    facts: dict[str, str]

    @property
    def lines(self) -> Iterator[str]:
        named = [f"{name} {value}" for name, value in self.facts.items() if value]
        if named:
            yield f"As the router renders the request: {len(self.source.tokens)} tokens; {'; '.join(named)}."
            yield ""


def given_prompt(args: argparse.Namespace, identity: ModelIdentity, keyring: Keyring | None) -> GivenPrompt:
    """The prompt that the arguments name. Raises: InvalidRequest: the prompt is unreadable, or the gateway would refuse
    it.
    """
    if args.messages is not None:
        return _rendered(args, args.messages, identity, keyring)
    tokenizer = load_tokenizer(args.model)
    if args.tokens_file is not None:
        source = SourcedPrompt(name="the prompt", tokens=_token_ids(args.tokens_file), tokenizer=tokenizer)
        return GivenPrompt(source=source, facts={})
    text = given_text(args.prompt) if args.prompt is not None else read_text(args.prompt_file)
    ids = np.array(tokenizer.encode(text), np.uint32)
    spans = (TextSpan(start=0, end=len(ids), text=text),)
    source = SourcedPrompt(name="the prompt", tokens=ids, tokenizer=tokenizer, body={"prompt": text}, spans=spans)
    return GivenPrompt(source=source, facts={})


def _rendered(args: argparse.Namespace, name: str, identity: ModelIdentity, keyring: Keyring | None) -> GivenPrompt:
    body = parse_json(read_text(Path(name)), name)
    tokenizer = load_tokenizer(args.model)
    prompt = asyncio.run(
        dry_run(
            body,
            args.api,
            identity=identity,
            tokenizer=tokenizer,
            # The deployment's own keys are needed only for thinking that is sealed in the request.
            keyring=keyring or Keyring(bytes(32)),
            tenant=args.tenant,
            config=_door(args),
        )
    )
    facts = {"format": prompt.chat_format, "user": prompt.user, "session": prompt.session, "moved": prompt.moved}
    source = SourcedPrompt(name=name, tokens=prompt.tokens, tokenizer=tokenizer, body=body, spans=prompt.spans)
    return GivenPrompt(source=source, user=prompt.user, facts=facts)


def _door(args: argparse.Namespace) -> GatewayConfig:
    """The gateway settings that the prompt depends on: from the arguments, else from the deployment's last start."""
    given = {name: getattr(args, name) for name in _DOOR_SETTINGS if getattr(args, name) is not None}
    if args.data_dir is None or len(given) == len(_DOOR_SETTINGS):
        return GatewayConfig(**given)
    path = args.data_dir / DOOR_FILE
    try:
        return GatewayConfig(**{**_settings_of_last_start(path), **given})
    except ConfigError as err:
        raise ConfigError(
            f"{err}; if {path} is damaged, remove it, and the next `antefix up` writes it again; until then give"
            " --chat-format, --model-aliases and --prefix-rules as `antefix up` has them"
        ) from err


def _settings_of_last_start(path: Path) -> dict[str, str]:
    """Empty if no deployment has started in the directory.  Raises:  ConfigError: the file is damaged."""
    if not os.path.lexists(path):
        return {}
    what = "settings of the last start"
    text = checked_files.read_text(path, what, bytes_max=_DOOR_BYTES_MAX)
    table = Table(parse_json(text, f"{what} {path}", error=ConfigError), f"{what} {path}")
    found = {name: table.take(name) for name in _DOOR_SETTINGS if table.has(name)}
    for name, value in found.items():
        if not isinstance(value, str):
            raise table.wrong(name, "a string", value)
    return found


def compare_with(
    args: argparse.Namespace, prompt: GivenPrompt, identity: ModelIdentity, keyring: Keyring | None
) -> int:
    """Compare a given prompt with a file or with a request of the ledger."""
    size = identity.geometry.block_size
    if _is_file(args.against):
        other = _rendered(args, args.against, identity, keyring).source
        found = compare(prompt.source, other, size)
        _print(args, found.as_dict(), comparison_lines(found))
        return 0
    record = _found(args, _ledgers(args), args.against)
    rough = _against_record(prompt, record, size, _needed(keyring))
    _print(args, rough.as_dict(), rough_lines(rough))
    return 0


def explain_request(args: argparse.Namespace, identity: ModelIdentity, keyring: Keyring | None) -> int:
    """Explain a request of the ledger, alone or compared with another one."""
    ledgers = _ledgers(args)
    record = _found(args, ledgers, args.request_id)
    size = identity.geometry.block_size
    if record.worker:
        # A fleet's engines have their own block sizes, which no model directory here tells.
        size = block_size_of(record.prompt_marks, record.prompt_tokens) or size
    if args.against is not None and _is_file(args.against):
        prompt = _rendered(args, args.against, identity, keyring)
        rough = _against_record(prompt, record, size, _needed(keyring))
    elif args.against is not None:
        rough = _records_compared(record, _found(args, ledgers, args.against), size)
    else:
        return _alone(args, record, ledgers, size)
    _print(args, {"request": record_dict(record, size), **rough.as_dict()}, rough_lines(rough))
    return 0


def _alone(args: argparse.Namespace, record: UsageRecord, ledgers: Sequence[Path], size: int) -> int:
    with ProgressLine("reading the ledger"):
        nearest = nearest_before(ledgers, record)
    answer: dict[str, Any] = {"request": record_dict(record, size), "nearest": None}
    said = [*record_lines(record, size)]
    if nearest is not None:
        rough = _records_compared(record, nearest.record, size)
        answer["nearest"] = {"request": record_dict(nearest.record, size), **rough.as_dict()}
        said += ["", "Of this user's earlier requests it has most in common with one:", *rough_lines(rough)]
    elif record.prompt_marks:
        said += ["", "No earlier request of this user is in the ledger with its block hashes."]
    _print(args, answer, said)
    return 0


def _records_compared(one: UsageRecord, other: UsageRecord, size: int) -> RoughComparison:
    if not comparable(one, other):
        differ = [name for name in ("tenant", "user", "fingerprint") if getattr(one, name) != getattr(other, name)]
        why = "one of them kept no block hashes: its prompt is shorter than a block, or an older version ran"
        if differ:
            why = f"they differ in {', '.join(differ)}, so nothing of one can be hit by the other"
        raise InvalidRequest(f"requests {one.request_id} and {other.request_id} cannot be compared: {why}")
    return RoughComparison(
        first_name=f"request {one.request_id}",
        second_name=f"request {other.request_id}",
        block_size=size,
        parting=parting(one.prompt_marks, other.prompt_marks),
    )


def _against_record(prompt: GivenPrompt, record: UsageRecord, size: int, keyring: Keyring) -> RoughComparison:
    """Name the prompt's blocks in the way the record's blocks were named, so that equal text has equal hashes."""
    whose = f"{record.tenant}{USER_SEPARATOR}{record.user}" if record.user else record.tenant
    named = [
        chain_of(
            prompt.source.tokens,
            fingerprint_digest=bytes.fromhex(record.fingerprint),
            key=keyring.key(whose),
            block_size=size,
            kind=kind,
        )
        for kind in (HashKind.CHAINED_AES, HashKind.CHAINED_BLAKE2B)
    ]
    # The record does not say which kind of hash named its blocks. Try each; hashes of the wrong kind match nothing.
    found = max((parting_of_chain(chain.hashes, record.prompt_marks) for chain in named), key=lambda it: it.blocks_min)
    ends = sorted({found.blocks_min * size, min((found.blocks_max + 1) * size, len(prompt.source.tokens)) - 1})
    spots = [spot for token in ends if (spot := prompt.source.spot(token)) is not None]
    name = f"request {record.request_id}"
    return RoughComparison(first_name=prompt.source.name, second_name=name, block_size=size, parting=found, spots=spots)


def _found(args: argparse.Namespace, ledgers: Sequence[Path], request_id: str) -> UsageRecord:
    with ProgressLine("reading the ledger"):
        return find_record(ledgers, request_id, args.tenant or None)


def _is_file(text: str) -> bool:
    return text == "-" or Path(text).is_file()


def _ledgers(args: argparse.Namespace) -> list[Path]:
    if args.ledger:
        return list(args.ledger)
    if args.data_dir is None:
        raise InvalidRequest("say where the ledger is: give --data-dir, or --ledger")
    return [args.data_dir]


def _needed(keyring: Keyring | None) -> Keyring:
    if keyring is None:
        raise InvalidRequest("block hashes depend on the deployment's secret: give --data-dir, or --secret-file")
    return keyring


def _print(args: argparse.Namespace, answer: dict[str, Any], lines: Sequence[str] | Iterator[str]) -> None:
    print(json.dumps(answer) if args.json else "\n".join(lines))


def _token_ids(path: Path) -> Tokens:
    ids = parse_json(read_text(path), str(path))
    if not isinstance(ids, list) or not all(isinstance(i, int) and 0 <= i < 1 << 32 for i in ids):
        raise InvalidRequest("--tokens-file must hold a JSON list of token ids")
    return np.array(ids, np.uint32)
