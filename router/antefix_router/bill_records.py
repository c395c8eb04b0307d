"""Builds a request's ledger entries: the OPEN entry at its start and the record at its end. Knows no files."""

from __future__ import annotations

import dataclasses
import hashlib
import time
from decimal import Decimal
from typing import Any

from antefix.generation_request import GenerationRequest
from antefix.secret import Keyring
from antefix.usage import Usage
from antefix_billing.ledger import Ledger
from antefix_billing.usage_record import OpenEntry, Status, UsageRecord, request_key
from antefix_router.open_bill import Bill, Served


class BillRecords:
    """Builds the ledger entries of one router. New records do not have a price yet."""

    def __init__(self, source_name: str, keyring: Keyring) -> None:
        self._source_name = source_name
        self._keyring = keyring

    def opened(self, request: GenerationRequest, served: Served) -> tuple[GenerationRequest, OpenEntry]:
        """The request with a seed, and its OPEN entry. served: the values that are now the same in all records of this
        router.
        """
        sampling, tenant = request.sampling, request.caller.tenant
        if sampling.temperature and sampling.seed is None:
            # The seed is derived from the id, so that a repeat of this request draws the same numbers and gives the
            # same answer.
            drawn = hashlib.blake2b(request_key(tenant, request.request_id).encode(), digest_size=7).digest()
            sampling = dataclasses.replace(sampling, seed=int.from_bytes(drawn, "little"))
            request = dataclasses.replace(request, sampling=sampling)
        return request, OpenEntry(
            request_id=request.request_id,
            attempt=1,
            tenant=tenant,
            user=request.caller.user,
            model=request.model or served.model,
            revision=served.revision,
            fingerprint=served.fingerprint,
            key_id=request.caller.key_id,
            request_digest=self.digest(request),
            prompt_tokens=request.num_tokens,
            started_us=_now_us(),
        )

    def ended(self, bill: Bill, status: Status, detail: str) -> UsageRecord:
        """The record of an ended request. If the answer is complete, all of its output counts as used; otherwise only
        the output that a client was given counts.
        """
        has_ended = status in (Status.STOP, Status.LENGTH)
        num_output = bill.generation.num_emitted if has_ended else bill.num_given
        used = dataclasses.replace(bill.used(num_output), output_write_tokens=bill.generation.output_written_tokens)
        if status is Status.FAILED and bill.generation.restore is None:
            # No worker reported its progress, so the whole prompt counts and none of it is known to be a hit.
            used = dataclasses.replace(used, prompt_tokens=bill.opened.prompt_tokens)
        return UsageRecord.of(
            used,
            **self._common(bill.opened),
            status=status,
            detail=detail,
            mode=bill.mode,
            prefix_volatile=bill.prefix_volatile,
            prompt_marks=bill.generation.prompt_marks,
            write_error=bill.write_error,
            paid_before=bill.paid_before,
            # The clock may have been set back meanwhile.
            finished_us=max(_now_us(), bill.opened.started_us + round(bill.total_s * 1e6)),
        )

    def crashed(self, ledger: Ledger, entry: OpenEntry) -> UsageRecord:
        """The record of a request that the previous process left open, with the counts from its progress file."""
        standing = ledger.find(entry.key)
        used = ledger.progress.found(entry.event_id) or Usage(prompt_tokens=entry.prompt_tokens)
        return UsageRecord.of(
            used,
            **self._common(entry),
            status=Status.CRASHED,
            detail="the router stopped in the middle",
            paid_before=Decimal(0) if standing is None else standing.record.paid,
            finished_us=max(_now_us(), entry.started_us),
        )

    def digest(self, request: GenerationRequest, generation: int = 0) -> str:
        """A keyed hash of the prompt and the sampling settings. Without the key, a reader of the ledger cannot test
        guesses of a prompt.
        """
        key = self._keyring.key(request.caller.tenant, generation)
        digest = hashlib.blake2b(key=key, digest_size=16, person=b"antefix-digest")
        # Log probabilities are left out of the hash, because they report on the answer without changing it.
        sampling = request.sampling
        if sampling.num_top_logprobs is not None:
            sampling = dataclasses.replace(sampling, num_top_logprobs=None)
        digest.update(repr(sampling).encode())
        digest.update(request.tokens.tobytes())
        if request.num_samples > 1:
            digest.update(f"{request.num_samples} samples".encode())
        digest.update(request.content)
        return digest.hexdigest()

    def _common(self, entry: OpenEntry) -> dict[str, Any]:
        values = entry.to_dict()
        del values["prompt_tokens"]
        return {**values, "source": self._source_name}


def _now_us() -> int:
    return time.time_ns() // 1000
