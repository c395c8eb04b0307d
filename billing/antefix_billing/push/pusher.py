"""Sends new ledger entries to one receiver, and records how far it got. An entry that the receiver refuses for good is
set aside as a dead letter.

    STATE/NAME.json     a cursor per ledger: entries up to it were accepted or are dead letters; replaced as a whole
    STATE/NAME.dead     dead letters, one JSON object per line, synced before the cursor passes them

A line of dead letters that is damaged stays in the file and counts as a dead letter, but cannot be sent again.
After a crash between sending and moving the cursor, the entries are sent again; the receiver recognises their ids.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Final

from antefix.checked_files import read_json
from antefix.errors import ConfigError
from antefix.private_file import open_private, write_private
from antefix_billing.adjustment import Adjusted
from antefix_billing.ledger_files import Settled, read_billed, source_of
from antefix_billing.ledger_mark import Mark
from antefix_billing.pruned import pruned_to
from antefix_billing.push.delivery import Delivery, delivery_of
from antefix_billing.push.push_config import SinkConfig
from antefix_billing.push.sinks import Rejected, Sink, TryLater

log = logging.getLogger("antefix_billing")

_WAIT_MIN_S: Final = 0.5
_WAIT_MAX_S: Final = 60.0


def sent_to(state: Path, source: bytes) -> int:
    """The last entry up to which all receivers in this state directory have every entry of a ledger, dead letters
    included; 0: none.
    """
    found = [read_cursors(path) for path in sorted(state.glob("*.json"))]
    return min((cursors.get(source.hex(), 0) for cursors in found), default=0)


def read_cursors(path: Path) -> dict[str, int]:
    """One receiver's cursors, by ledger.  Raises:  ConfigError: the file does not hold cursors."""
    if not path.exists():
        return {}
    found = read_json(path, "push cursors")
    cursors = found.get("cursors") if isinstance(found, dict) else None
    if not isinstance(cursors, dict) or not all(type(value) is int for value in cursors.values()):
        raise ConfigError(f"{path} holds no cursors")
    return dict(cursors)


@dataclass(slots=True)
class PushCounters:
    """sent: entries accepted by the receiver.  dead: dead letters.  failed: calls that failed and will be repeated."""

    sent: int = 0
    dead: int = 0
    failed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadLetter:
    """An entry that the receiver refused for good, or whose tenant has no customer there.  ledger: the ledger's source,
    hex.
    """

    ledger: str
    sequence: int
    why: str

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def of_json(cls, text: str) -> DeadLetter | None:
        """None if `to_json` did not write this text: the line is damaged, incomplete, or of a later version."""
        try:
            said = json.loads(text)
        except (ValueError, RecursionError):
            return None
        if not isinstance(said, dict) or said.keys() != {"ledger", "sequence", "why"}:
            return None
        letter = cls(**said)
        is_sound = isinstance(letter.ledger, str) and isinstance(letter.why, str) and type(letter.sequence) is int
        return letter if is_sound and letter.sequence > 0 else None


@dataclass(slots=True)
class _DeadFile:
    """What a file of dead letters holds.  damaged: lines that hold no letter.  torn: the end of the file, if a crash
    cut its last line off; the line's entry lies after the cursor, so it will be sent again.
    """

    letters: list[DeadLetter]
    damaged: list[str]
    torn: str

    @classmethod
    def of(cls, text: str) -> _DeadFile:
        *lines, torn = text.split("\n")
        if DeadLetter.of_json(torn) is not None:
            lines.append(torn)
            torn = ""
        found = [(line, DeadLetter.of_json(line)) for line in lines]
        return cls(
            [letter for _, letter in found if letter is not None],
            [line for line, letter in found if letter is None],
            torn,
        )

    def to_text(self) -> str:
        return "".join(line + "\n" for line in [*self.damaged, *(each.to_json() for each in self.letters)]) + self.torn


# Inode, size and time of the last change.
FileState = tuple[int, int, int]


class Pusher:
    """Sends the entries of any number of ledgers to one receiver of usage. Only one process at a time may use the state
    directory.
    """

    def __init__(
        self,
        config: SinkConfig,
        sink: Sink,
        ledgers: Sequence[Path],
        state: Path,
        *,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        """sleep: waits for that many seconds; a true return value stops the pusher."""
        self.config = config
        self.counters = PushCounters()
        self._sink = sink
        self._ledgers = {source_of(ledger).hex(): ledger for ledger in ledgers}
        self._path = state / f"{config.name}.json"
        self._dead_path = state / f"{config.name}.dead"
        self._sleep = sleep
        self._num_damaged_told = 0
        # The entries with a dead letter, and the state of the file that they were read from: without this, each of many
        # letters would read all letters before it.
        self._buried: set[tuple[str, int]] = set()
        self._buried_at: FileState | None = None
        self.cursors = read_cursors(self._path)

    def backlog(self) -> int:
        """How many ledger entries lie after the cursors."""
        ends = {source: Mark.of(ledger) for source, ledger in self._ledgers.items()}
        return sum(max(0, mark.sequence - self.cursors.get(source, 0)) for source, mark in ends.items() if mark)

    @property
    def num_dead(self) -> int:
        """How many dead letters there are, including those of earlier runs and damaged ones."""
        found = self._read_dead()
        return len(found.letters) + len(found.damaged)

    def push(self) -> bool:
        """Send all entries that exist now. Returns False if the pusher was stopped while it waited."""
        for source, ledger in self._ledgers.items():
            durable = mark.sequence if (mark := Mark.of(ledger)) is not None else None
            self._tell_pruned(source, ledger)
            items = (
                item
                for item in read_billed(ledger, after=self.cursors.get(source, 0))
                if durable is None or item.sequence <= durable
            )
            # Ledgers are sent in order, one batch after the other. A batch that cannot be sent until the pusher is
            # stopped ends the run.
            if not all(self._push_batch(source, batch) for batch in _batches(items, self._sink.num_a_batch)):
                return False
        return True

    def _tell_pruned(self, source: str, ledger: Path) -> None:
        """Log which entries were pruned before they could be sent, and move the cursor past them."""
        last, _ = pruned_to(ledger)
        if (cursor := self.cursors.get(source, 0)) < last:
            log.error(
                "the receiver %s will not get entries %d to %d of ledger %s, which were pruned (removed); "
                "`antefix usage restore` brings them back for an export",
                self.config.name, cursor + 1, last, source,
            )  # fmt: skip
            self.cursors[source] = last

    def push_dead(self) -> int:
        """Send dead letters again, and remove those that are accepted. Returns how many remain, with damaged ones."""
        found = self._read_dead()
        left = []
        for letter in found.letters:
            delivery = self._of_letter(letter)
            try:
                if delivery is None:
                    raise Rejected(letter.why)
                self._sink.send([delivery])
                self.counters.sent += 1
            except (Rejected, TryLater) as err:
                left.append(replace(letter, why=str(err)))
        write_private(self._dead_path, replace(found, letters=left).to_text())
        return len(left) + len(found.damaged)

    def _of_letter(self, letter: DeadLetter) -> Delivery | None:
        """Returns None if the entry's ledger is not among these, or if its tenant still has no customer."""
        ledger = self._ledgers.get(letter.ledger)
        if ledger is None:
            return None
        item = next(read_billed(ledger, after=letter.sequence - 1), None)
        return None if item is None or item.sequence != letter.sequence else self._delivery(item)

    def _push_batch(self, source: str, batch: Sequence[Settled | Adjusted]) -> bool:
        deliveries = []
        for item in batch:
            delivery = self._delivery(item)
            if delivery is not None:
                deliveries.append(delivery)
            elif self.config.unmapped != "skip":
                self._bury(source, item.sequence, f"tenant {_tenant_of(item)!r} has no customer")
        if deliveries and not self._send(source, deliveries):
            return False
        self.cursors[source] = batch[-1].sequence
        write_private(self._path, json.dumps({"cursors": self.cursors}) + "\n")
        return True

    def _delivery(self, item: Settled | Adjusted) -> Delivery | None:
        customer = self.config.customer(_tenant_of(item))
        return None if customer is None else delivery_of(item, customer)

    def _send(self, source: str, deliveries: Sequence[Delivery]) -> bool:
        """Send until each item is accepted or is a dead letter. If a batch is refused, its items are sent one by one to
        find the refused one.
        """
        wait_s = _WAIT_MIN_S
        while True:
            try:
                self._sink.send(deliveries)
                self.counters.sent += len(deliveries)
                return True
            except Rejected as err:
                if len(deliveries) > 1:
                    return all(self._send(source, [each]) for each in deliveries)
                self._bury(source, deliveries[0].sequence, str(err))
                return True
            except TryLater as err:
                self.counters.failed += 1
                log.warning(
                    "sending to %s failed: %s; the next try is in %g s",
                    self.config.name,
                    err,
                    max(wait_s, err.retry_after_s),
                )
                if self._sleep(max(wait_s, err.retry_after_s)):
                    return False
                wait_s = min(_WAIT_MAX_S, 2 * wait_s)

    def _bury(self, source: str, sequence: int, why: str) -> None:
        line = DeadLetter(ledger=source, sequence=sequence, why=why).to_json() + "\n"
        if self._buried_at is None or self._buried_at != _state_of(self._dead_path):
            # Another run, or an operator, may have changed the file.
            found = self._read_dead()
            self._buried = {(letter.ledger, letter.sequence) for letter in found.letters}
            if (source, sequence) not in self._buried:
                self._end_torn(found, line)
        if (source, sequence) in self._buried:
            self._buried_at = _state_of(self._dead_path)
            return
        self.counters.dead += 1
        log.error(
            "the receiver %s refused entry %d of ledger %s, so it was set aside: %s",
            self.config.name,
            sequence,
            source,
            why,
        )
        with open_private(self._dead_path, "a") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        self._buried.add((source, sequence))
        self._buried_at = _state_of(self._dead_path)

    def _end_torn(self, found: _DeadFile, line: str) -> None:
        """Make the file end with a whole line, so that the next one begins a line of its own."""
        text = self._dead_text()
        if not text or text.endswith("\n"):
            return
        # Most often the torn line is of the same entry, which was sent again. Anything else is kept.
        same = found.torn and line.startswith(found.torn)
        write_private(self._dead_path, text.removesuffix(found.torn) if same else text + "\n")

    def _dead_text(self) -> str:
        if not self._dead_path.exists():
            return ""
        return self._dead_path.read_bytes().decode(errors="surrogateescape")

    def _read_dead(self) -> _DeadFile:
        found = _DeadFile.of(self._dead_text())
        if len(found.damaged) > self._num_damaged_told:
            log.error(
                "%s: damaged lines: %d; they stay in the file, and their entries were not sent to %s; "
                "compare the ledger with what the receiver has, then remove these lines",
                self._dead_path, len(found.damaged), self.config.name,
            )  # fmt: skip
        self._num_damaged_told = len(found.damaged)
        return found


def _state_of(path: Path) -> FileState | None:
    """What changes when a file is written. None: there is no file."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def _batches(items: Iterator[Settled | Adjusted], number: int) -> Iterator[list[Settled | Adjusted]]:
    while batch := list(islice(items, number)):
        yield batch


def _tenant_of(item: Settled | Adjusted) -> str:
    return item.record.tenant if isinstance(item, Settled) else item.adjustment.tenant
