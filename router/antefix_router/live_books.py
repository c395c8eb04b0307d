"""Applies changes to tenants, keys, limits, rate cards and the receipt key while a router runs: on SIGHUP, and when a
file changes.

All changed files are read and checked first. After that, either all changes apply, or none of them does and the fault
is logged and counted. Which settings are in force is recorded in the ledger. A rate card that would change the price of
existing records is refused unless the card has `rerate = true`; then adjustments bring those records to the new prices.
Existing records are never rewritten. The same holds for rate cards that changed while the router was down. If a crash
interrupted the pricing of earlier records, the next start continues it.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from antefix.end_tasks import end_tasks
from antefix.errors import AntefixError, ConfigError
from antefix_billing.accepted_cards import accept_cards, accepted_cards, accepted_texts, texts_of
from antefix_billing.adjustment import Change, ChangeKind
from antefix_billing.adjustment_inbox import read_waiting, waiting
from antefix_billing.card_changes import (
    ChangedTime,
    affected,
    changed_times,
    entry_before,
    models_of,
    refuse_priced,
)
from antefix_billing.ledger import Ledger
from antefix_billing.ledger_files import read_billed, read_settled, sequence_before
from antefix_billing.limits import LimitWindow
from antefix_billing.ratecard import RateCards, parse_cards
from antefix_billing.receipt import Signer
from antefix_billing.rerate import rerated
from antefix_billing.tenants import TenantBook, load_tenants
from antefix_billing.usage_commit import LedgerWriter
from antefix_billing.usage_record import UsageRecord
from antefix_router.front import BilledFront, BillingConfig, is_open_to_all

log = logging.getLogger("antefix.router")

LOOK_S: Final = 1.0
_NUM_A_BATCH: Final = 500


class LiveBooks:
    """Applies one router's changes. The object works after `start`. num_changes, num_refused: how many changes were
    applied, and how many refused.
    """

    def __init__(self, config: BillingConfig, front: BilledFront) -> None:
        """Raises:  ConfigError: a card would change the price of existing records without asking for a re-rating."""
        self._config = config
        self._front = front
        self._paths = [Path(path) for path in (config.tenants_file, *config.ratecards) if path]
        self._seen = self._look_at_files()
        self._digest = self._read_digest()
        self._asked = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self.num_changes = 0
        self.num_refused = 0
        self._keys_number = front.keys.number
        self._cards_text = texts_of(config.ratecards)
        self._times_to_rerate = self._check_start()

    def start(self) -> None:
        self._task = asyncio.create_task(self._run())

    async def close(self) -> None:
        if self._task is not None:
            await end_tasks([self._task])

    def ask(self) -> None:
        """Check the files now, even if their times did not change. SIGHUP does this."""
        self._asked.set()

    def _check_start(self) -> list[ChangedTime]:
        """The times in which records must be priced again.  Raises:  ConfigError: as `__init__`."""
        accounts = self._front.accounts
        ledger = accounts.ledger
        if ledger is None or accepted_texts(ledger.directory) == self._cards_text:
            return []
        old = accepted_cards(ledger.directory)
        if old is None:
            return []
        times = changed_times(old, accounts.cards, self._models(ledger, old, accounts.cards), datetime.now(UTC))
        if times:
            # Records that this router priced by these same cards before it stopped are no reason to refuse the cards.
            refuse_priced(ledger, entry_before(ledger, times), times, priced_by=accounts.cards)
        return times

    async def _begin(self) -> None:
        """Price records again where rate cards have changed since the last run."""
        accounts = self._front.accounts
        ledger = accounts.ledger
        if ledger is None or accepted_texts(ledger.directory) == self._cards_text:
            return
        if accepted_texts(ledger.directory) is not None:
            await self._note(ChangeKind.RATE_CARDS, list(self._config.ratecards), self._digest)
        if self._times_to_rerate:
            await self._rerate(accounts.cards, self._times_to_rerate)
        await asyncio.to_thread(accept_cards, ledger.directory, self._cards_text)

    async def _run(self) -> None:
        try:
            await self._begin()
        except Exception:
            log.exception(
                "rate cards that changed while this router was down could not be recorded; the next start of "
                "the router records them"
            )
        while True:
            is_asked = self._asked.is_set()
            self._asked.clear()
            try:
                await self.look(is_asked=is_asked)
            except Exception:
                log.exception("tenants and rate cards could not be read")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_S):
                    await self._asked.wait()

    async def look(self, *, is_asked: bool = False) -> None:
        """Apply adjustments that are waiting, and files that changed."""
        await self._take_inbox()
        await self._note_keys()
        seen = await asyncio.to_thread(self._look_at_files)
        if seen == self._seen and not is_asked:
            return
        self._seen = seen
        try:
            await self._reload()
        except (AntefixError, OSError) as err:
            self.num_refused += 1
            log.error(  # noqa: TRY400 - a fault of the file's
                "the new files cannot be used: %s; the tenants and rate cards that were in force stay in force", err
            )

    async def _reload(self) -> None:
        """Raises:  ConfigError: a file is faulty, or a card would change existing prices without asking for a
        re-rating.
        """
        config, accounts = self._config, self._front.accounts
        digest = await asyncio.to_thread(self._read_digest)
        signer = Signer.from_file(self._front.signer_path) if self._front.signer_path else None
        # 1. Read all files. If any is faulty, none is applied.
        texts = await asyncio.to_thread(texts_of, config.ratecards)
        has_keys = bool(config.api_keys_file)
        tenants = load_tenants(config.tenants_file, has_other_keys=has_keys) if config.tenants_file else None
        cards = parse_cards(texts)
        # 2. Check whether the new cards would price existing records differently.
        is_same = texts == self._cards_text
        times, read_to = ([], None) if is_same else await self._check_cards(accounts.cards, cards)
        # 3. Read everything else before anything is applied.
        now = datetime.now(UTC)
        month = await asyncio.to_thread(_used_since, accounts.ledger, LimitWindow.MONTH.start(now)) if tenants else []
        # 4. Apply everything. There is no await from here on.
        if times or read_to is not None:
            self._check_again(times, read_to)
        if tenants is not None:
            self._take_tenants(tenants, month, now)
        accounts.cards = cards
        if signer is not None:
            self._front.take_signer(signer)
        if digest == self._digest:
            return
        self._digest = digest
        self.num_changes += 1
        await self._record(digest)
        if times:
            await self._rerate(cards, times)
        self._cards_text = texts
        if accounts.ledger is not None:
            # This is last: a re-rating that breaks off is continued at the next start.
            await asyncio.to_thread(accept_cards, accounts.ledger.directory, texts)

    async def _check_cards(self, old: RateCards, new: RateCards) -> tuple[list[ChangedTime], int | None]:
        """The periods in which records must be priced again, and the last ledger entry that was read. Raises:
        ConfigError.
        """
        ledger = self._front.accounts.ledger
        if ledger is None:
            return [], None
        models = await asyncio.to_thread(self._models, ledger, old, new)
        times = changed_times(old, new, models, datetime.now(UTC))
        if not times:
            return [], None
        read_to = ledger.sequence
        after = await asyncio.to_thread(entry_before, ledger, times)
        await asyncio.to_thread(refuse_priced, ledger, after, times)
        return times, read_to

    def _models(self, ledger: Ledger, old: RateCards, new: RateCards) -> list[str]:
        """The models whose prices a change of rate cards may concern."""
        models = {*old.models, *new.models, self._front.accounts.served.model}
        if "*" in models:
            models |= models_of(ledger)
        return sorted(models - {"*", ""})

    def _check_again(self, times: list[ChangedTime], read_to: int | None) -> None:
        """Check the records that were written while the ledger was being read."""
        ledger = self._front.accounts.ledger
        if ledger is not None and read_to is not None and ledger.sequence > read_to:
            refuse_priced(ledger, read_to, times)

    def _take_tenants(self, tenants: TenantBook, month: list[UsageRecord], now: datetime) -> None:
        front = self._front
        front.accounts.quotas.replace(tenants.limits, tenants.default, month, now)
        front.keys.named = dict(tenants.keys)
        front.keys.open_as = "" if is_open_to_all(tenants, needed=bool(self._config.api_keys_file)) else None

    async def _record(self, digest: dict[str, str]) -> None:
        log.info(
            "the files of tenants and rate cards were read again, and are in force: %s",
            ", ".join(sorted(digest)) or "none",
        )
        await self._note(ChangeKind.TENANTS, [self._config.tenants_file], digest)
        await self._note(ChangeKind.RATE_CARDS, list(self._config.ratecards), digest)

    async def _note(self, kind: ChangeKind, paths: list[str], digest: dict[str, str]) -> None:
        writer = self._front.accounts.writer
        files = {Path(path).name: digest[path] for path in paths if path in digest}
        if files and isinstance(writer, LedgerWriter):
            content = json.dumps({"sha256": files}, sort_keys=True)
            await writer.note(Change(kind=kind, content=content, created_us=time.time_ns() // 1000))

    async def _rerate(self, cards: RateCards, times: list[ChangedTime]) -> None:
        accounts = self._front.accounts
        ledger, writer = accounts.ledger, accounts.writer
        assert ledger is not None and isinstance(writer, LedgerWriter)
        adjustments = await asyncio.to_thread(
            lambda: list(
                rerated(
                    read_billed(ledger.directory),
                    cards,
                    chosen=lambda record: any(True for _ in affected([record], times)),
                    now_us=time.time_ns() // 1000,
                    reason="a rate card that asks for it was put in force",
                    author="antefix router",
                )
            )
        )
        for start in range(0, len(adjustments), _NUM_A_BATCH):
            await asyncio.gather(*(writer.adjust(each) for each in adjustments[start : start + _NUM_A_BATCH]))
        log.info("%d records were priced again", len(adjustments))

    async def _note_keys(self) -> None:
        """Record in the ledger that API keys were changed elsewhere (`key_changes`) and are in force."""
        book = self._front.keys.book
        if book.number == self._keys_number:
            return
        self._keys_number = book.number
        writer = self._front.accounts.writer
        if isinstance(writer, LedgerWriter):
            digest = hashlib.sha256(repr(book).encode()).hexdigest()
            content = json.dumps({"number": book.number, "keys": len(book.keys), "sha256": digest}, sort_keys=True)
            await writer.note(Change(kind=ChangeKind.API_KEYS, content=content, created_us=time.time_ns() // 1000))

    async def _take_inbox(self) -> None:
        writer = self._front.accounts.writer
        if not isinstance(writer, LedgerWriter):
            return
        for path in await asyncio.to_thread(waiting, writer.ledger.directory):
            try:
                adjustments = await asyncio.to_thread(read_waiting, path)
                await asyncio.gather(*(writer.adjust(each) for each in adjustments))
                await asyncio.to_thread(path.unlink, missing_ok=True)
            except ConfigError as err:
                log.error("%s", err)  # noqa: TRY400 - a fault of the file's
                await asyncio.to_thread(path.rename, path.with_suffix(".refused"))
            except AntefixError as err:
                log.warning("the bill adjustments in %s are not in the ledger yet: %s", path, err)

    def _look_at_files(self) -> tuple[object, ...]:
        return tuple(_state_of(path) for path in self._paths)

    def _read_digest(self) -> dict[str, str]:
        found = {}
        for path in self._paths:
            with contextlib.suppress(OSError):
                found[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest()
        return found


def _state_of(path: Path) -> tuple[int, ...] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return (found.st_ino, found.st_mtime_ns, found.st_size, found.st_mode)


def _used_since(ledger: Ledger | None, start: datetime) -> list[UsageRecord]:
    if ledger is None:
        return []
    after = sequence_before(ledger.directory, start.timestamp())
    return [item.record for item in read_settled(ledger.directory, after=after)]
