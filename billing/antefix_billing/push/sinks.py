"""Receivers of usage: OpenMeter, Lago and Stripe through their own Python clients, and a webhook with an HMAC.

Each receiver drops repeats by an id that stays the same: OpenMeter by (source, id), Lago by `transaction_id`, Stripe by
`identifier` (for at least a day), a webhook by `webhook-id` and each event's id. Sources: openmeter.io/docs (ingest),
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
from antefix.extras import needs
from antefix.whole_number import whole_number
from antefix_billing.push.delivery import Delivery
from antefix_billing.push.push_config import SinkConfig

_TIMEOUT_S: Final = 20.0
_RETRY_AFTER_S_MAX: Final = 24 * 3600


class Rejected(Exception):
    """The receiver reports that it will never accept this item."""


class TryLater(Exception):
    """The receiver may accept this later: it is unreachable, busy, or does not accept our key yet.  retry_after_s: the
    wait that it asks for.
    """

    def __init__(self, message: str, retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Sink(Protocol):
    """A receiver of usage. num_a_batch: how many items the receiver accepts at a time."""

    num_a_batch: int

    def send(self, batch: Sequence[Delivery]) -> None:
        """Send a batch. When this returns, the receiver has accepted the items.  Raises:  Rejected, TryLater."""


def open_sink(config: SinkConfig) -> Sink:
    """Open a receiver.  Raises:  ConfigError: the client library of the receiver is not installed."""
    kinds: dict[str, Callable[[SinkConfig], Sink]] = {
        "openmeter": OpenMeterSink,
        "lago": LagoSink,
        "stripe": StripeSink,
        "webhook": WebhookSink,
    }
    return kinds[config.kind](config)


class WebhookSink:
    """POST {"events": [CloudEvent, ...]}, signed as Standard Webhooks defines it: `v1,` and the base64 of the
    HMAC-SHA256 of "ID.TIMESTAMP.BODY". Any 2xx status means that the events were accepted.
    """

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
    """The value that a receiver compares with the header `webhook-signature`."""
    made = hmac.new(secret, f"{id}.{seconds}.".encode() + body, hashlib.sha256).digest()
    return "v1," + base64.b64encode(made).decode()


class OpenMeterSink:
    """Sends batches of CloudEvents. OpenMeter recognises repeats by their (source, id)."""

    num_a_batch = 100

    def __init__(self, config: SinkConfig) -> None:
        try:
            from openmeter import Client
        except ImportError as err:
            raise ConfigError(needs(f"sink {config.name}", "openmeter", "push")) from err
        # This program repeats failed calls. Repeats inside the client would hide how much is waiting.
        self._client: Any = Client(endpoint=config.url, token=config.key, retry_total=0)

    def send(self, batch: Sequence[Delivery]) -> None:
        try:
            # Sent as bytes, because the client's own type would turn decimals into floats.
            body = io.BytesIO(json.dumps([each.event for each in batch], separators=(",", ":")).encode())
            self._client.events.ingest_events(body, content_type="application/cloudevents-batch+json")
        except Exception as err:
            raise _failure_of(err) from err


class LagoSink:
    """Sends one event per item. The event's properties are the counts; `precise_total_amount_cents` is the exact
    price.
    """

    num_a_batch = 100

    def __init__(self, config: SinkConfig) -> None:
        try:
            from lago_python_client.client import Client
            from lago_python_client.models import BatchEvent, Event
        except ImportError as err:
            raise ConfigError(needs(f"sink {config.name}", "lago-python-client", "push")) from err
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
                return  # Lago already has this event
            raise _failure_of(err) from err


class StripeSink:
    """Sends a meter event for each count that is not zero. Adjustments are not sent, because they are money and meters
    count tokens.
    """

    num_a_batch = 1

    def __init__(self, config: SinkConfig) -> None:
        try:
            import stripe
        except ImportError as err:
            raise ConfigError(needs(f"sink {config.name}", "stripe", "push")) from err
        self._meters = config.meters
        # This program repeats failed calls. Repeats inside the client would hide how much is waiting.
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
    """Classify a client's exception by its HTTP status, which the clients store in different attributes. Without a
    status, nobody has answered the call.

    Raises:  the exception itself, if it is a bug of this program.
    """
    if isinstance(err, AttributeError | TypeError):
        raise err
    status = next(
        (s for name in ("status_code", "http_status") if isinstance(s := getattr(err, name, None), int)), None
    )
    headers = getattr(getattr(err, "response", None), "headers", None) or getattr(err, "headers", None) or {}
    return _failure(status, f"{type(err).__name__}: {err}"[:500], headers.get("retry-after"))


def _failure(status: int | None, message: str, retry_after: str | None) -> Rejected | TryLater:
    # 401, 403 and 404 are the operator's to mend (a key, a missing meter). The event itself is not at fault.
    if status is not None and 400 <= status < 500 and status not in (401, 403, 404, 408, 409, 425, 429):
        return Rejected(message)
    return TryLater(message, float(whole_number(retry_after, _RETRY_AFTER_S_MAX) or 0))
