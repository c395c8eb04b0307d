"""A gateway with scripted workers, and the bodies that agents send to it."""

import copy
import json

from antefix_billing.ledger_files import read_settled

MODEL = "antefix-tiny"
CHAT_URL, RESPONSES_URL, MESSAGES_URL = "/v1/chat/completions", "/v1/responses", "/v1/messages"


class Door:
    """A gateway with scripted workers, and the requests that they got."""

    def __init__(self, client, script, ledger):
        self.client, self.script, self._ledger = client, script, ledger

    async def post(self, address, body, **headers):
        return await self.client.post(address, content=json.dumps(body).encode(), headers=headers)

    async def ok(self, address, body, **headers):
        answer = await self.post(address, body, **headers)
        assert answer.status_code == 200, answer.text
        return answer

    async def refused(self, address, body):
        """(param, code) of a refusal in OpenAI's shape. Anthropic's shape has only param."""
        answer = await self.post(address, body)
        assert answer.status_code == 400, answer.text
        error = answer.json()["error"]
        assert error["type"] == "invalid_request_error"
        return error["param"], error.get("code")

    @property
    def prompt(self):
        """The last prompt, as text."""
        return bytes(t for t in self.script.prompts[-1] if t < 256).decode(errors="replace")

    @property
    def records(self):
        return [item.record for item in read_settled(self._ledger)]


def with_key(body, path, key, value):
    body = copy.deepcopy(body)
    holder = body
    for name in path:
        holder = holder[name]
    holder[key] = value
    return body


def chat(*messages, **fields):
    return {"model": MODEL, "messages": [*messages], **fields}


def user(content, **more):
    return {"role": "user", "content": content, **more}


def assistant(content="", **more):
    return {"role": "assistant", "content": content, **more}


def asked(*messages, **fields):
    return {"model": MODEL, "max_tokens": 50, "messages": [*messages], **fields}


def text_part(text, **more):
    return {"type": "text", "text": text, **more}
