"""The part that all APIs share: authentication, the choice of the model, the conversation as tokens, admission. Knows
no provider.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from starlette.requests import Request

from antefix.block import as_tokens
from antefix.cache_tenant import split_tenant
from antefix.errors import InvalidRequest
from antefix.generation_request import Breakpoint, Caller, GenerationRequest
from antefix.telemetry import span
from antefix_billing.api_keys import Scope
from antefix_billing.key_register import KeyHolder
from antefix_billing.limits import LimitPassed
from antefix_router.chat.answer_grammar import json_grammar
from antefix_router.chat.answer_memory import AnswerMemory
from antefix_router.chat.chat_formats import ChatFormat, OutputParser, PlainParser
from antefix_router.chat.choice import choose_format
from antefix_router.chat.messages import Conversation, Effort, Piece, ToolRule
from antefix_router.chat.moved_lines import load_rules, move_lines
from antefix_router.chat.render import Rendered, num_characters, num_plain_characters, render_tokens
from antefix_router.chat.schema import UnusableSchema, UnusableTool
from antefix_router.encoding import CHARACTERS_MIN, Encoding
from antefix_router.front import BilledFront, Front, cache_tenant
from antefix_router.gateway.access import KEY_ID, REQUEST_ID, TENANT
from antefix_router.gateway.answer_form import CHAT_NAMES, AnswerForm, SchemaNames
from antefix_router.gateway.bodies import Room, check_length, parse_body, read_body
from antefix_router.gateway.cache_report import DETAILS_HEADER
from antefix_router.gateway.choices import Choices
from antefix_router.gateway.fields import Fields, WrongField
from antefix_router.gateway.gateway_config import GatewayConfig
from antefix_router.gateway.http_errors import Provider
from antefix_router.gateway.knobs import Knobs
from antefix_router.gateway.limit_headers import limit_headers
from antefix_router.gateway.model_names import REFUSE, ModelNames, NamedModel, load_aliases
from antefix_router.gateway.modes import Wish
from antefix_router.gateway.notes import IgnoredFields, Notes
from antefix_router.gateway.output import Output
from antefix_router.gateway.signatures import Signatures
from antefix_router.gateway.user_names import split_user
from antefix_router.grammar_check import UnusableGrammar

BREAKPOINTS_MAX = 4
# Preparing a schema's grammar takes as long as encoding this many characters.
_SCHEMA_CHARACTERS = 4096
# How many requests of a tenant may be read or running, per request that may run.
_HERE_FACTOR = 2
# Headers that enable fields in the body. They are reported as ignored, because the body's fields are read without them.
_BETA_HEADERS = ("anthropic-beta", "openai-beta")


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpCaller(Caller):
    """has_key: whether the client gave the request an id, so that it may ask for the answer again.

    wants_details: whether the usage reports what the cache did.
    """

    has_key: bool = False
    wants_details: bool = False

    @property
    def is_named(self) -> bool:
        """Whether the client gave the request an id. Other requests get an id from the router."""
        return self.has_key


class Door:
    """Decides which HTTP callers are admitted, and identifies them. books: checks API keys and writes the bill."""

    def __init__(
        self, front: BilledFront, config: GatewayConfig, encoding: Encoding, *, num_tokens_max: int = 0
    ) -> None:
        """encoding: parses large bodies. num_tokens_max: the largest number of token ids in a prompt."""
        self.config = config
        self.room = Room(config.http_requests_max)
        self.why_unready: Callable[[], str] = lambda: ""
        self._encoding = encoding
        self._num_tokens_max = num_tokens_max
        self.started = int(time.time())
        self.ignored = IgnoredFields()
        self.books = front

    @contextlib.contextmanager
    def entering(self, request: Request) -> Iterator[None]:
        """Wraps a call whose head has arrived and whose body has not been read yet.

        Raises:  TooLarge, InvalidRequest: judged by its head.  QuotaExceeded: its tenant has nothing left, or already
        runs as many requests as it may.  Overloaded: no room.  Also the errors of `tenant`.
        """
        tenant = self.tenant(request)
        check_length(request, self.config.http_body_bytes_max)
        quotas = self.books.accounts.quotas
        if "idempotency-key" not in request.headers:
            # A request with an id may be a retry, whose answer already exists and is paid for.
            quotas.check(tenant, now=datetime.now(UTC))
        requests = quotas.limits_of(tenant).requests
        # Twice as many may be read as may run: a request whose answer has just ended still counts here for a moment,
        # and a retry joins a running one. Admission decides how many run.
        most = None if requests is None else _HERE_FACTOR * requests
        with self.room.taken(tenant, requests=most, is_shared=self._is_shared):
            yield

    def limit_headers(self, request: Request, provider: Provider) -> dict[str, str]:
        """Headers with the remaining limits of the tenant, if it has limits."""
        tenant = request.scope.get(TENANT)
        if tenant is None:
            return {}
        now, accounts = datetime.now(UTC), self.books.accounts
        kinds = (LimitPassed.REQUESTS, LimitPassed.TOKENS)
        others = accounts.shared.quotas.others(tenant) if accounts.shared is not None else {}
        states = {what: accounts.quotas.state(tenant, what, now, others) for what in kinds}
        return limit_headers(states, provider, now)

    async def body(self, request: Request, tenant: str) -> Any:
        """Raises:  TooLarge, TooSlow, Overloaded, InvalidRequest, WrongField: see `bodies`."""
        config = self.config
        check_length(request, config.http_body_bytes_max)
        with self.room.holding(tenant, is_shared=self._is_shared) as held:
            body = await read_body(request, held, config.http_body_bytes_max, timeout_s=config.http_body_timeout_s)
            return await parse_body(body, self._encoding, tenant=tenant, num_tokens_max=self._num_tokens_max)

    @property
    def _is_shared(self) -> bool:
        """Whether keys distinguish several callers."""
        return self.books.keys.open_as is None

    def tenant(self, request: Request) -> str:
        """The tenant that sends the request.

        Raises:  Unauthenticated: keys are needed and the key is missing or unknown.  PermissionDenied: the key lacks
        the scope.
        """
        return self.holder(request, Scope.GENERATE).tenant

    def holder(self, request: Request, scope: Scope) -> KeyHolder:
        """The holder of the API key in the request.  Raises:  as `tenant`."""
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        bearer = token.strip() if scheme.lower() == "bearer" else ""
        holder = self.books.keys.authenticate(request.headers.get("x-api-key") or bearer, scope)
        request.scope[TENANT] = holder.tenant
        request.scope[KEY_ID] = holder.key_id
        return holder

    def caller(self, request: Request, tenant: str, user: str, session: str = "") -> HttpCaller:
        """user: the client's name for the user, in which a session may be included. The session in the name is used as
        a placement hint if `session` is empty.
        """
        named = split_user(user)
        key = request.headers.get("idempotency-key", "")
        request_id = key or request.scope.get(REQUEST_ID, "")
        details = request.headers.get(DETAILS_HEADER, "").lower() == "true"
        return HttpCaller(
            tenant=tenant,
            user=named.user,
            request_id=request_id,
            has_key=bool(key),
            session=session or named.session,
            key_id=request.scope.get(KEY_ID, ""),
            wants_details=details or self.config.http_usage_details,
        )


class Gateway(Door):
    """The HTTP side of one router."""

    def __init__(self, front: Front, config: GatewayConfig) -> None:
        super().__init__(front, config, front.encoding, num_tokens_max=front.identity.max_tokens)
        self.front = front
        self.memory = AnswerMemory()
        self.format: ChatFormat = choose_format(config.chat_format, front.identity.path, front.tokenizer, bounded=True)
        self.models = ModelNames(
            (front.identity.name, *config.model_names),
            load_aliases(config.model_aliases) if config.model_aliases else (),
            serve_unknown=config.unknown_models != REFUSE,
        )
        self.prefix_rules = load_rules(config.prefix_rules)

    @contextlib.contextmanager
    def generating(self, request: Request) -> Iterator[None]:
        """As `entering`, but for a call that runs the model.

        Raises:  Overloaded: its first token would take too long.
        """
        with self.entering(request):
            # A request with a client's id may be a retry, whose answer already exists.
            may_refuse = "idempotency-key" not in request.headers
            with self.front.shedding.waiting(request.scope[TENANT], may_refuse=may_refuse):
                yield

    async def fields(self, request: Request) -> Fields:
        """The request's body, with its notes on ignored fields.

        Raises:  InvalidRequest: the body is not a JSON object.
        """
        body = await self.body(request, request.scope.get(TENANT, ""))
        notes = Notes(self.ignored)
        for name in _BETA_HEADERS:
            if name in request.headers:
                notes.ignore(name)
        return Fields(body, notes=notes)

    def model(self, fields: Fields) -> NamedModel:
        """The model that the request names. Raises: ModelNotFound: the name is unknown, and the settings refuse unknown
        names.
        """
        found = self.models.find(fields.text("model"))
        if not found.is_own:
            fields.notes.model = self.front.identity.name
        return found

    def signatures(self, tenant: str) -> Signatures:
        return Signatures(self.front.accounts.keyring, tenant)

    def choose_effort(self, wish: Wish, model: NamedModel, default: Effort, notes: Notes) -> Effort:
        """How the model should think: as the request says, else as the model's name says, else the default.

        A model that cannot think answers without thinking. The fields that asked for thinking are reported as ignored.
        """
        effort = wish.effort or model.effort or default
        if not self.format.supports_reasoning:
            effort = Effort.NONE
            for path in wish.asked_by:
                notes.ignore(path)
        notes.mode = self.format.mode_name(effort)
        return effort

    def settled(self, conversation: Conversation, notes: Notes) -> Conversation:
        """The conversation with its changing lines moved to a later place. The moved lines are noted."""
        conversation, moved = move_lines(conversation, self.prefix_rules)
        for each in moved:
            notes.move(each.rule.name, f"{len(each.text)} characters, changes with the {each.rule.changes.value}")
        return conversation

    async def render(
        self, conversation: Conversation, tenant: str, notes: Notes, *, payer: str | None = None
    ) -> Rendered:
        """The prompt's tokens, and the positions of the client's cache breakpoints. payer: the tenant whose quota must
        cover the tokens; None: no quota is checked.

        Raises:  ContextTooLong, QuotaExceeded: the text is so long that it must have too many tokens.
        """
        pieces = await self._written(conversation, split_tenant(tenant)[0])
        self.front.check_text(num_characters(pieces), num_plain=num_plain_characters(pieces), payer=payer)
        with span("tokenize", num_characters=num_characters(pieces)):
            rendered = await self.front.encoding.run(
                num_characters(pieces),
                lambda: render_tokens(pieces, self.front.tokenizer, self.memory, tenant=tenant),
                tenant=split_tenant(tenant)[0],
            )
        notes.num_restored = rendered.num_restored
        # Like Anthropic, use four breakpoints at most. More are not an error: the last ones keep everything that the
        # earlier ones would.
        return replace(rendered, breakpoints=rendered.breakpoints[-BREAKPOINTS_MAX:])

    async def _written(self, conversation: Conversation, tenant: str) -> list[Piece]:
        if not self.format.is_program:
            return self.format.render(conversation)
        return await self.front.encoding.run(
            max(CHARACTERS_MIN, sum(len(message.content) for message in conversation.messages)),
            lambda: self.format.render(conversation),
            tenant=tenant,
        )

    async def chat(
        self,
        conversation: Conversation,
        knobs: Knobs,
        caller: HttpCaller,
        notes: Notes,
        names: SchemaNames = CHAT_NAMES,
    ) -> Output:
        """Admit the request for a conversation's next answer.  notes: completed before the answer's headers are made.
        names: the API's names of its schema fields.

        Raises:  InvalidRequest, QuotaExceeded, Conflict: see `Front.admit`.
        """
        return (await self.chat_choices(conversation, knobs, caller, notes, names)).shown[0]

    async def chat_choices(
        self,
        conversation: Conversation,
        knobs: Knobs,
        caller: HttpCaller,
        notes: Notes,
        names: SchemaNames = CHAT_NAMES,
    ) -> Choices:
        """Admit the request for a conversation's next answers, as many as the knobs say.  Raises: as `chat`."""
        grammar = await self._grammar(conversation, names)
        payer = None if caller.has_key else caller.tenant
        rendered = await self.render(conversation, cache_tenant(caller.tenant, caller.user), notes, payer=payer)
        request = self._request(rendered.tokens, knobs, caller, grammar=grammar, breakpoints=rendered.breakpoints)
        memory = None if conversation.continue_last else self.memory
        strict = {
            tool["name"]: tool["parameters"] for tool in conversation.tools if tool["name"] in conversation.strict
        }
        choices = await self._admit(
            request,
            knobs,
            caller,
            lambda: self.format.parser(conversation),
            memory=memory,
            strict=strict,
            mode=self.format.mode_name(conversation.effort),
        )
        if rendered.aside is not None:
            self.memory.keep_aside(*rendered.aside)
        return choices

    async def complete(
        self,
        tokens: list[int],
        knobs: Knobs,
        caller: HttpCaller,
        form: AnswerForm,
        *,
        retention_s: float | None = None,
    ) -> Choices:
        """Admit the request for continuations of these tokens. retention_s: for how many seconds the prompt is to be
        kept; None: as usual.
        """
        grammar = ""
        if form.is_json:
            try:
                grammar = json_grammar(form.schema)
                await self.front.grammars.check(grammar)
            except (UnusableSchema, UnusableGrammar) as err:
                raise wrong_schema(form.param, err) from err
        kept = () if retention_s is None else (Breakpoint(num_tokens=len(tokens), ttl_s=retention_s),)
        request = self._request(tokens, knobs, caller, grammar=grammar, breakpoints=kept)
        return await self._admit(request, knobs, caller, PlainParser)

    async def _admit(
        self,
        request: GenerationRequest,
        knobs: Knobs,
        caller: HttpCaller,
        parser: Callable[[], OutputParser],
        *,
        memory: AnswerMemory | None = None,
        strict: Mapping[str, Any] | None = None,
        mode: str = "",
    ) -> Choices:
        bill = await self.front.admit(request, retryable=caller.has_key)
        bill.mode = mode
        outputs = [
            Output(
                self.front,
                bill,
                parser(),
                stop=knobs.stop,
                memory=memory,
                strict=strict,
                index=index,
                tells_logprobs=knobs.num_top_logprobs is not None,
            )
            for index in range(request.num_samples)
        ]
        for output in outputs:
            output.wants_details = caller.wants_details
        return Choices(self.front, bill, outputs, num_shown=knobs.n)

    def _request(
        self,
        tokens: list[int],
        knobs: Knobs,
        caller: HttpCaller,
        *,
        grammar: str,
        breakpoints: tuple[Breakpoint, ...] = (),
    ) -> GenerationRequest:
        most = self.front.identity.max_tokens - len(tokens)
        sampling = knobs.sampling(
            self.front.tokenizer, max_tokens_default=max(1, min(self.config.http_max_tokens, most)), grammar=grammar
        )
        return GenerationRequest(
            tokens=as_tokens(tokens),
            sampling=sampling,
            caller=caller,
            breakpoints=breakpoints,
            num_samples=knobs.best_of,
        )

    async def _grammar(self, conversation: Conversation, names: SchemaNames) -> str:
        """The grammar that the answer must follow, after a check of the grammar; empty: any answer is allowed. Raises:
        WrongField: the error names the schema that cannot be used.
        """
        if not conversation.has_form:
            return ""
        size = _SCHEMA_CHARACTERS * (1 + len(conversation.tools))
        try:
            grammar = await self.front.encoding.run(size, lambda: self.format.grammar(conversation))
        except UnusableTool as err:
            raise wrong_schema(names.of_tool(err.number), err) from err
        except UnusableSchema as err:
            raise wrong_schema(names.answer, err) from err
        if conversation.continue_last:
            raise InvalidRequest(
                "an answer that continues an assistant's message cannot be held to an output format: leave that"
                " message out"
            )
        try:
            await self.front.grammars.check(grammar)
        except UnusableGrammar as err:
            raise wrong_schema(await self._at_fault(conversation, names), err) from err
        return grammar

    async def _at_fault(self, conversation: Conversation, names: SchemaNames) -> str:
        """The field whose schema cannot be enforced, found by checking each tool alone."""
        for number, tool in enumerate(conversation.tools):
            rule = ToolRule(must_call=True, names=frozenset((tool["name"],)))
            alone = replace(conversation, tool_rule=rule, answers_json=False, effort=Effort.NONE)
            try:
                await self.front.grammars.check(self.format.grammar(alone))
            except (UnusableSchema, UnusableGrammar):
                return names.of_tool(number)
        return names.answer if conversation.answers_json else "tools"


def wrong_schema(param: str, err: InvalidRequest) -> WrongField:
    return WrongField(f"{param}: {err}", param=param, code="invalid_value")
