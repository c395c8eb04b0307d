"""Receivers of usage: OpenMeter, Lago and Stripe through their own Python clients, and a webhook with an HMAC.

Each gets stable ids by which it drops what it had before: OpenMeter (source, id), Lago `transaction_id`, Stripe
`identifier` (for a day at least), a webhook `webhook-id` and each event's id. Sources: openmeter.io/docs (ingest),
docs.getlago.com (events), docs.stripe.com (billing meter events), standardwebhooks.com.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import io
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from typing import Any, Final, Protocol

from antefix.errors import ConfigError
from antefix_billing.push.delivery import Delivery
from antefix_billing.push.push_config import SinkConfig

_TIMEOUT_S: Final = 20.0
_EXTRA: Final = "pip install 'antefix[push]'"


class Rejected(Exception):
    """The receiver will never take this: it says so."""


class TryLater(Exception):
    """It may be taken later: the receiver is away, busy, or does not know us. retry_after_s: as it asks."""

    def __init__(self, message: str, retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Sink(Protocol):
    """num_a_batch: how many it takes at a time."""

    num_a_batch: int

    def send(self, batch: Sequence[Delivery]) -> None:
        """Taken when this returns.  Raises:  Rejected, TryLater."""


def open_sink(config: SinkConfig) -> Sink:
    """Raises:  ConfigError: its client is not installed."""
    kinds: dict[str, Callable[[SinkConfig], Sink]] = {
        "openmeter": OpenMeterSink,
        "lago": LagoSink,
        "stripe": StripeSink,
        "webhook": WebhookSink,
    }
    return kinds[config.kind](config)


class WebhookSink:
    """POST {"events": [CloudEvent, ...]}, signed as Standard Webhooks says: `v1,` and the HMAC-SHA256 of
    "ID.TIMESTAMP.BODY", base64. Any 2xx takes it."""

    num_a_batch = 100

    def __init__(self, config: SinkConfig) -> None:
        self._url, self._secret = config.url, config.key.encode()

    def send(self, batch: Sequence[Delivery]) -> None:
        body = json.dumps({"events": [each.event for each in batch]}, separators=(",", ":")).encode()
        ids = "\n".join(each.id for each in batch)
        id = f"msg_{hashlib.blake2b(ids.encode(), digest_size=16).hexdigest()}"
        seconds = str(int(time.time()))
        request = urllib.request.Request(self._url, data=body, method="POST")
        for name, value in {
            "content-type": "application/json",
            "webhook-id": id,
            "webhook-timestamp": seconds,
            "webhook-signature": signature(self._secret, id, seconds, body),
        }.items():
            request.add_header(name, value)
        try:
            with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as answer:
                answer.read()
        except urllib.error.HTTPError as err:
            raise _failure(err.code, f"the webhook answered {err.code}", err.headers.get("retry-after")) from err
        except OSError as err:
            raise TryLater(f"the webhook does not answer: {err}") from err


def signature(secret: bytes, id: str, seconds: str, body: bytes) -> str:
    """What a receiver compares with `webhook-signature`."""
    made = hmac.new(secret, f"{id}.{seconds}.".encode() + body, hashlib.sha256).digest()
    return "v1," + base64.b64encode(made).decode()


class OpenMeterSink:
    """A batch of CloudEvents; their (source, id) is what OpenMeter tells repeats by."""

    num_a_batch = 100

    def __init__(self, config: SinkConfig) -> None:
        try:
            from openmeter import Client
        except ImportError as err:
            raise ConfigError(f"sink {config.name}: {_EXTRA}") from err
        # Repeats are ours: those of the client would hide what is waiting.
        self._client: Any = Client(endpoint=config.url, token=config.key, retry_total=0)

    def send(self, batch: Sequence[Delivery]) -> None:
        try:
            # As bytes: the client's own type would turn decimals into floats.
            body = io.BytesIO(json.dumps([each.event for each in batch], separators=(",", ":")).encode())
            self._client.events.ingest_events(body, content_type="application/cloudevents-batch+json")
        except Exception as err:
            raise _failure_of(err) from err


class LagoSink:
    """One event each; the counts are its properties, the exact price is `precise_total_amount_cents`."""

    num_a_batch = 100

    def __init__(self, config: SinkConfig) -> None:
        try:
            from lago_python_client.client import Client
            from lago_python_client.models import BatchEvent, Event
        except ImportError as err:
            raise ConfigError(f"sink {config.name}: {_EXTRA}") from err
        self._code = config.code
        self._client: Any = Client(api_key=config.key, api_url=config.url)
        self._event, self._batch = Event, BatchEvent

    def send(self, batch: Sequence[Delivery]) -> None:
        events = [
            self._event(
                transaction_id=each.id,
                external_subscription_id=each.customer,
                code=self._code,
                timestamp=each.seconds,
                precise_total_amount_cents=format(100 * each.amount, "f"),
                properties={name: str(value) for name, value in each.event["data"].items()},
            )
            for each in batch
        ]
        try:
            if len(events) == 1:
                self._client.events.create(events[0])
            else:
                self._client.events.batch_create(self._batch(events=events))
        except Exception as err:
            if len(events) == 1 and "value_already_exist" in f"{err} {getattr(err, 'response', '')}":
                return  # it has it
            raise _failure_of(err) from err


class StripeSink:
    """A meter event for each count that is not zero. An adjustment is not tokens, and is nothing for a meter."""

    num_a_batch = 1

    def __init__(self, config: SinkConfig) -> None:
        try:
            import stripe
        except ImportError as err:
            raise ConfigError(f"sink {config.name}: {_EXTRA}") from err
        self._meters = config.meters
        # Repeats are ours: those of the client would hide what is waiting.
        self._client: Any = stripe.StripeClient(
            config.key, base_addresses={"api": config.url.rstrip("/")}, max_network_retries=0
        )

    def send(self, batch: Sequence[Delivery]) -> None:
        for each in batch:
            for event_name, count in self._meters.items():
                if each.counts.get(count, 0):
                    self._send(each, event_name, each.counts[count])

    def _send(self, each: Delivery, event_name: str, value: int) -> None:
        params = {
            "event_name": event_name,
            "identifier": f"{each.id}-{event_name}"[:100],
            "timestamp": each.seconds,
            "payload": {"stripe_customer_id": each.customer, "value": str(value)},
        }
        try:
            self._client.v1.billing.meter_events.create(params=params)
        except Exception as err:
            if "already exists with identifier" in str(err):
                return
            raise _failure_of(err) from err


def _failure_of(err: Exception) -> Rejected | TryLater:
    """Of a client's exception: they name the HTTP status in one of these ways, or none where nobody answered.

    Raises:  what is a fault of our own.
    """
    if isinstance(err, AttributeError | TypeError):
        raise err
    status = next(
        (s for name in ("status_code", "http_status") if isinstance(s := getattr(err, name, None), int)), None
    )
    headers = getattr(getattr(err, "response", None), "headers", None) or getattr(err, "headers", None) or {}
    return _failure(status, f"{type(err).__name__}: {err}"[:500], headers.get("retry-after"))


def _failure(status: int | None, message: str, retry_after: str | None) -> Rejected | TryLater:
    # 401, 403 and 404 are ours to mend (a key, a meter that is not made yet), and no fault of the event's.
    if status is not None and 400 <= status < 500 and status not in (401, 403, 404, 408, 409, 425, 429):
        return Rejected(message)
    return TryLater(message, float(retry_after) if retry_after and retry_after.isdigit() else 0.0)
