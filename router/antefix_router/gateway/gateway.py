"""What all APIs need: who calls, which model, the conversation as tokens, the request admitted. Knows no provider."""

from __future__ import annotations

import time
from dataclasses import dataclass

from starlette.requests import Request

from antefix.block import as_tokens
from antefix.errors import InvalidRequest
from antefix.wire import Sampling
from antefix_router.chat.answer_memory import AnswerMemory
from antefix_router.chat.chat_formats import ChatFormat, PlainParser
from antefix_router.chat.choice import choose_format
from antefix_router.chat.messages import Conversation, Effort
from antefix_router.chat.render import num_characters, render_tokens
from antefix_router.front import Front, cache_tenant
from antefix_router.gateway.fields import Fields
from antefix_router.gateway.gateway_config import GatewayConfig
from antefix_router.gateway.http import read_json
from antefix_router.gateway.model_names import REFUSE, ModelNames, NamedModel, load_aliases
from antefix_router.gateway.modes import Wish
from antefix_router.gateway.notes import IgnoredFields, Notes
from antefix_router.gateway.output import Output, stop_tokens
from antefix_router.gateway.signatures import Signatures

BREAKPOINTS_MAX = 4
STOPS_MAX = 16
# They turn on what a request may then ask for in its body, where it is read, or not.
_BETA_HEADERS = ("anthropic-beta", "openai-beta")


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """Who asks, under which request id ("" lets us make one), in which conversation (a hint for placement, or "")."""

    tenant: str
    user: str
    request_id: str
    session: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Knobs:
    """How to sample, as the APIs say it. max_tokens None: the server's default; num_top_logprobs None: none."""

    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    num_top_logprobs: int | None = None


class Gateway:
    """The HTTP side of one router."""

    def __init__(self, front: Front, config: GatewayConfig) -> None:
        self.front = front
        self.config = config
        self.memory = AnswerMemory()
        self.format: ChatFormat = choose_format(config.chat_format, front.identity.path, front.tokenizer)
        self.started = int(time.time())
        self.ignored = IgnoredFields()
        self.models = ModelNames(
            (front.identity.name, *config.model_names),
            load_aliases(config.model_aliases) if config.model_aliases else (),
            serve_unknown=config.unknown_models != REFUSE,
        )

    def tenant(self, request: Request) -> str:
        """Raises:  Unauthenticated: no key, or an unknown one, where keys are needed."""
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        bearer = token.strip() if scheme.lower() == "bearer" else ""
        return self.front.tenants.authenticate(request.headers.get("x-api-key") or bearer)

    async def fields(self, request: Request) -> Fields:
        """The body, with the request's notes. Raises:  InvalidRequest: it is no JSON object."""
        config = self.config
        body = await read_json(request, config.http_body_bytes_max, timeout_s=config.http_body_timeout_s)
        notes = Notes(self.ignored)
        for name in _BETA_HEADERS:
            if name in request.headers:
                notes.ignore(name)
        return Fields(body, notes=notes)

    def caller(self, request: Request, tenant: str, user: str, session: str = "") -> Caller:
        return Caller(tenant=tenant, user=user, request_id=request.headers.get("idempotency-key", ""), session=session)

    def model(self, fields: Fields) -> NamedModel:
        """Which model is asked for. Raises:  ModelNotFound: one that is not here."""
        found = self.models.find(fields.text("model"))
        if not found.is_own:
            fields.notes.model = self.front.identity.name
        return found

    def signatures(self, tenant: str) -> Signatures:
        return Signatures(self.front.accounts.keyring, tenant)

    def choose_effort(self, wish: Wish, model: NamedModel, default: Effort, notes: Notes) -> Effort:
        """How the model is to think: as the request says, else as the model's name does, else by default.

        A model that cannot think answers without; what asked for it is noted as ignored.
        """
        effort = wish.effort or model.effort or default
        if not self.format.supports_reasoning:
            effort = Effort.NONE
            for path in wish.asked_by:
                notes.ignore(path)
        notes.mode = self.format.mode_name(effort)
        return effort

    async def tokens_of(
        self, conversation: Conversation, tenant: str, notes: Notes
    ) -> tuple[list[int], tuple[tuple[int, float], ...]]:
        """The prompt's tokens, and where the client's cache breakpoints lie in them."""
        pieces = self.format.render(conversation)
        rendered = await self.front.encoding.run(
            num_characters(pieces),
            lambda: render_tokens(pieces, self.front.tokenizer, self.memory, tenant=tenant),
        )
        notes.num_restored = rendered.num_restored
        # As with Anthropic, but that more of them are no error: the last ones keep all that the others would.
        return rendered.tokens, rendered.breakpoints[-BREAKPOINTS_MAX:]

    async def chat(self, conversation: Conversation, knobs: Knobs, caller: Caller, notes: Notes) -> Output:
        """Admit a conversation's next answer. notes: what is told of it, before the answer's headers are made.

        Raises:  InvalidRequest, QuotaExceeded, Conflict: see `Front.admit`.
        """
        tokens, breakpoints = await self.tokens_of(conversation, cache_tenant(caller.tenant, caller.user), notes)
        parser = self.format.parser(conversation)
        bill = await self.front.admit(
            as_tokens(tokens),
            self._sampling(knobs, len(tokens)),
            tenant=caller.tenant,
            user=caller.user,
            request_id=caller.request_id,
            session=caller.session,
            breakpoints=breakpoints,
            retryable=bool(caller.request_id),
        )
        bill.mode = self.format.mode_name(conversation.effort)
        memory = None if conversation.continue_last else self.memory
        strict = {
            tool["name"]: tool["parameters"] for tool in conversation.tools if tool["name"] in conversation.strict
        }
        return Output(self.front, bill, parser, stop=knobs.stop, memory=memory, strict=strict)

    async def complete(self, tokens: list[int], knobs: Knobs, caller: Caller) -> Output:
        """Admit the continuation of tokens, as they are."""
        bill = await self.front.admit(
            as_tokens(tokens),
            self._sampling(knobs, len(tokens)),
            tenant=caller.tenant,
            user=caller.user,
            request_id=caller.request_id,
            session=caller.session,
            retryable=bool(caller.request_id),
        )
        return Output(self.front, bill, PlainParser(), stop=knobs.stop, memory=None)

    def _sampling(self, knobs: Knobs, num_prompt_tokens: int) -> Sampling:
        if len(knobs.stop) > STOPS_MAX:
            raise InvalidRequest(f"at most {STOPS_MAX} stop sequences")
        max_tokens = knobs.max_tokens
        if max_tokens is None:
            max_tokens = max(1, min(self.config.http_max_tokens, self.front.identity.max_tokens - num_prompt_tokens))
        return Sampling(
            max_tokens=max_tokens,
            temperature=knobs.temperature,
            top_p=knobs.top_p,
            seed=None if knobs.seed is None else knobs.seed & (2**63 - 1),
            stop=stop_tokens(self.front.tokenizer, knobs.stop),
            num_top_logprobs=knobs.num_top_logprobs,
        )
