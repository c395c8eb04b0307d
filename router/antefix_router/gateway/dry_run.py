"""Turns a request's body into its prompt without running the request, with the same code as the HTTP server up to
admission.

For `antefix explain`, offline. Answers are encoded from their text, because the generated tokens are remembered only by
a running router.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, cast

import numpy as np
from starlette.requests import Request

from antefix.clients import Tokens
from antefix.errors import InvalidRequest
from antefix.generation_request import GenerationRequest
from antefix.model_dir import ModelIdentity
from antefix.secret import Keyring
from antefix.tokenizer import Tokenizer
from antefix_billing.key_register import KeyRegister
from antefix_billing.ratecard import RateCards
from antefix_billing.tenants import TenantBook
from antefix_router.accounting import Accounts
from antefix_router.chat.answer_memory import AnswerMemory
from antefix_router.chat.messages import Answer, Aside, Conversation, Piece, TextBreakpoint
from antefix_router.chat.render import TextSpan, render_tokens
from antefix_router.front import Front
from antefix_router.gateway.access import REQUEST_ID
from antefix_router.gateway.anthropic import prepare_messages
from antefix_router.gateway.chat import prepare_chat
from antefix_router.gateway.gateway import Gateway
from antefix_router.gateway.gateway_config import GatewayConfig
from antefix_router.gateway.notes import Notes
from antefix_router.gateway.responses import prepare_response
from antefix_router.generation import Generator
from antefix_router.open_bill import Bill, Served

_PREPARE: Final = {"chat": prepare_chat, "responses": prepare_response, "anthropic": prepare_messages}
APIS: Final = tuple(_PREPARE)


@dataclass(frozen=True, slots=True, kw_only=True)
class DryPrompt:
    """A prompt, its tenant, and the text that its tokens were made from. moved: the value of the answer's header
    `antefix-moved`.
    """

    tokens: Tokens
    user: str
    session: str
    chat_format: str
    moved: str
    spans: tuple[TextSpan, ...]


class _Admitted(Exception):
    def __init__(self, request: GenerationRequest) -> None:
        super().__init__("admitted")
        self.request = request


class _DryFront(Front):
    async def admit(self, request: GenerationRequest, *, retryable: bool = False) -> Bill:
        raise _Admitted(request)


class _DryGateway(Gateway):
    """Keeps the rendered prompt."""

    pieces: Sequence[Piece] = ()
    moved = ""

    def settled(self, conversation: Conversation, notes: Notes) -> Conversation:
        conversation = super().settled(conversation, notes)
        self.moved = notes.headers().get("antefix-moved", "")
        self.pieces = self.format.render(conversation)
        return conversation


async def dry_run(
    body: Any,
    api: str,
    *,
    identity: ModelIdentity,
    tokenizer: Tokenizer,
    keyring: Keyring,
    tenant: str = "",
    config: GatewayConfig | None = None,
) -> DryPrompt:
    """Turn a request's body, or only its list of messages, into a prompt.

    Raises:  InvalidRequest: the gateway would refuse the body.
    """
    accounts = Accounts(
        None,
        served=Served(model=identity.name, revision="", fingerprint=""),
        keyring=keyring,
        cards=RateCards(),
        tenants=TenantBook(),
    )
    front = _DryFront(
        cast(Generator, None),
        accounts,
        identity=identity,
        tokenizer=tokenizer,
        tenants=TenantBook(),
        signer=None,
        keys=KeyRegister(open_as=tenant),
    )
    gateway = _DryGateway(front, config or GatewayConfig())
    if isinstance(body, list):
        body = {"input" if api == "responses" else "messages": body}
    if isinstance(body, dict):
        needed = {"model": identity.name, **({"max_tokens": 1} if api == "anthropic" else {})}
        body = {**needed, **body}
    try:
        await _PREPARE[api](gateway, _request(body))
    except _Admitted as admitted:
        return DryPrompt(
            tokens=np.asarray(admitted.request.tokens, np.uint32),
            user=admitted.request.caller.user,
            session=admitted.request.caller.session,
            chat_format=gateway.format.name,
            moved=gateway.moved,
            spans=tuple(_spans(gateway.pieces, tokenizer)),
        )
    finally:
        await front.close()
    raise InvalidRequest("the request was not admitted")


def _request(body: Any) -> Request:
    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}

    scope = {"type": "http", "method": "POST", "path": "/", "query_string": b"", "headers": [], REQUEST_ID: "dry"}
    return Request(scope, receive)


def _spans(pieces: Sequence[Piece], tokenizer: Tokenizer) -> list[TextSpan]:
    """The spans of text, each encoded separately, as `render_tokens` does."""
    spans, start = [], 0
    for piece in pieces:
        if isinstance(piece, TextBreakpoint):
            continue
        for part in piece.pieces if isinstance(piece, (Answer, Aside)) else (piece,):
            end = start + len(render_tokens((part,), tokenizer, AnswerMemory(), tenant="").tokens)
            spans.append(TextSpan(start=start, end=end, text=part.text))
            start = end
    return spans
