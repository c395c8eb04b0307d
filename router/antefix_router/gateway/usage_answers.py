"""`GET /v1/usage` and `/v1/organization/usage/completions`: the usage of a tenant, from the ledgers on this host."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Final

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from antefix.errors import AntefixError, InvalidRequest, PermissionDenied, Unavailable
from antefix.whole_number import whole_number
from antefix_billing.adjustment import Adjusted
from antefix_billing.api_keys import Scope
from antefix_billing.ledger_files import Settled, read_billed, sequence_before
from antefix_billing.pruned import pruned_to
from antefix_billing.usage_buckets import WIDTHS, UsageQuery, bucketed, names_of, openai_page, plain_rows
from antefix_router.gateway.gateway import Door
from antefix_router.gateway.http_errors import Provider, error_response

PATHS: Final = ("/v1/usage", "/v1/organization/usage/completions")
# Filters by OpenAI's names. Each accepts several values.
_FILTERS: Final = {"models": "model", "user_ids": "user", "api_key_ids": "key"}
_LATEST_S: Final = 1 << 40


def usage_routes(door: Door) -> list[Route]:
    # One request reads the ledger's files at a time, so that the router keeps its processor time for other work.
    turn = asyncio.Lock()
    return [Route(path, partial(_usage, door, turn), methods=["GET"]) for path in PATHS]


async def _usage(door: Door, turn: asyncio.Lock, request: Request) -> Response:
    try:
        holder = door.holder(request, Scope.USAGE)
        tenants = _several(request, "tenant") or _several(request, "project_ids")
        if any(tenant != holder.tenant for tenant in tenants) and Scope.ADMIN not in holder.scopes:
            raise PermissionDenied("usage of another tenant needs an API key with the scope admin")
        # A key with the scope `admin` gets all tenants unless the request names some.
        is_admin = Scope.ADMIN in holder.scopes
        query, next_page = _query(request, frozenset(tenants or ([] if is_admin else [holder.tenant])))
        ledger = door.books.accounts.ledger
        if ledger is None:
            raise Unavailable("this router keeps no ledger")
        directories = [ledger.directory, *door.books.accounts.peers.directories]
        async with turn:
            found = await asyncio.to_thread(lambda: bucketed(_read(directories, query), query))
            num_pruned = await asyncio.to_thread(_num_pruned, directories)
        shape = request.query_params.get("shape", "openai")
        if shape not in ("openai", "plain"):
            raise InvalidRequest(f"shape is openai or plain, not {shape!r}")
        headers = {"antefix-ledgers": str(len(directories))}
        if num_pruned:
            headers["antefix-pruned"] = str(num_pruned)
        if shape == "plain":
            answer = {"rows": plain_rows(found, query.by), "next_page": next_page}
        else:
            answer = openai_page(found, query, next_page=next_page)
        return JSONResponse(answer, headers=headers)
    except AntefixError as err:
        return error_response(err, Provider.OPENAI)


def _read(directories: list[Path], query: UsageQuery) -> Iterator[Settled | Adjusted]:
    for directory in directories:
        if (directory / "source").exists():
            yield from read_billed(directory, after=sequence_before(directory, query.start_s))


def _num_pruned(directories: list[Path]) -> int:
    """How many entries were pruned. Entries that were pruned are missing from an answer about their time."""
    return sum(pruned_to(directory)[0] for directory in directories if directory.exists())


def _query(request: Request, tenants: frozenset[str]) -> tuple[UsageQuery, str | None]:
    """The query of a request, and the page to begin at. A page is named by its first second.

    Raises:  InvalidRequest: a parameter is invalid.
    """
    width = request.query_params.get("bucket_width", "1d")
    if width not in WIDTHS:
        raise InvalidRequest(f"bucket_width is one of {', '.join(WIDTHS)}, not {width!r}")
    width_s, usual, most = WIDTHS[width]
    limit = _number(request, "limit", usual)
    if not 1 <= limit <= most:
        raise InvalidRequest(f"limit must be from 1 to {most} with buckets of {width}, is {limit}")
    now = int(time.time())
    end = _number(request, "end_time", now + 1)
    start = _number(request, "page", _number(request, "start_time", now - (limit - 1) * width_s))
    if end <= start:
        raise InvalidRequest("end_time must be after start_time")
    start -= start % width_s
    stop = min(end, start + limit * width_s)
    where = {ours: frozenset(values) for theirs, ours in _FILTERS.items() if (values := _several(request, theirs))}
    if tenants:
        where["tenant"] = tenants
    by = names_of(_several(request, "group_by"))
    query = UsageQuery(start_s=start, end_s=stop, width=width, by=by, where=where)
    return query, str(stop) if stop < end else None


def _several(request: Request, name: str) -> list[str]:
    """A list of usage in one of the forms that clients use: NAME=a&NAME=b, NAME[]=a, or NAME=a,b."""
    found = [*request.query_params.getlist(name), *request.query_params.getlist(f"{name}[]")]
    return [part for text in found for part in text.split(",") if part]


def _number(request: Request, name: str, default: int) -> int:
    text = request.query_params.get(name)
    if text is None:
        return default
    number = whole_number(text, _LATEST_S - 1)
    if number is None:
        raise InvalidRequest(f"{name} must be a whole number, is {text[:40]!r}")
    return number
