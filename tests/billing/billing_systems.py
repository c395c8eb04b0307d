"""Local stand-ins for the billing systems' documented APIs, which keep the events that they receive by event id."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs


class BillingSystem:
    """OpenMeter, Lago, Stripe and a webhook at one address.

    taken: events by id; of two with the same id the first one is kept.  num_calls: the number of bodies received.
    answers: statuses of the next answers. With 500 the events are taken (a lost answer), with 4xx they are not.
    """

    def __init__(self):
        self.taken, self.num_calls, self.answers, self.heads, self.bodies = {}, 0, [], [], []
        self.refuse = lambda id, event: None
        system = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["content-length"]))
                system.heads.append(dict(self.headers.items()))
                system.bodies.append(body)
                status, answer = system.answer(self.path, body)
                data = b"" if answer is None else json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args):
                return

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self):
        self._server.shutdown()
        self._server.server_close()

    def answer(self, path, body):
        self.num_calls += 1
        planned = self.answers.pop(0) if self.answers else 0
        if 400 <= planned < 500:
            return planned, {"error": {"message": "planned"}}
        events = self.events(path, body)
        for id, event in events:
            if (status := self.refuse(id, event)) is not None:
                return status, {"error": {"message": "refused"}, "code": "validation_errors"}
        if "stripe" in path or "meter_events" in path:
            ((id, event),) = events
            if id in self.taken:
                message = f"An event already exists with identifier {id}."
                return 400, {"error": {"type": "invalid_request_error", "message": message}}
        is_one_of_lago = path.endswith("/events") and b'"event":' in body.replace(b" ", b"")
        if is_one_of_lago and events[0][0] in self.taken:
            return 422, {"code": "validation_errors", "error_details": {"transaction_id": ["value_already_exist"]}}
        for id, event in events:
            self.taken.setdefault(id, event)
        if planned:
            return planned, {}
        if body.startswith(b"["):
            return 204, None  # OpenMeter's ingest
        return 200, {"object": "billing.meter_event", "event": events[0][1]}

    def events(self, path, body):
        if "meter_events" in path:
            form = {name: values[0] for name, values in parse_qs(body.decode()).items()}
            return [(form["identifier"], form)]
        found = json.loads(body)
        if isinstance(found, list):
            return [((each["source"], each["id"]), each) for each in found]
        if "event" in found:
            event = {**found["event"], "lago_id": "x", "created_at": "2026-01-01T00:00:00Z"}
            return [(event["transaction_id"], event)]
        if found["events"] and "transaction_id" in found["events"][0]:
            return [(each["transaction_id"], each) for each in found["events"]]
        return [((each["source"], each["id"]), each) for each in found["events"]]
