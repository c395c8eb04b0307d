"""The part that gRPC and HTTP have in common: a request is checked, and run with its bill. Knows neither protocol."""

from __future__ import annotations

import secrets
from collections.abc import AsyncGenerator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from antefix.cache_tenant import join_tenant
from antefix.clients import Tokens
from antefix.config import require, setting
from antefix.errors import InvalidRequest
from antefix.generation_request import GenerationRequest
from antefix.model_dir import ModelIdentity
from antefix.redis_access import RedisAccess, check_redis_url, redis_ca_setting, redis_password_setting
from antefix.sampling import WrongSetting
from antefix.secret import Keyring
from antefix.tokenizer import Tokenizer
from antefix_billing.anchor import check_place
from antefix_billing.api_keys import CONTROL
from antefix_billing.key_file import read_book
from antefix_billing.key_register import KeyRegister
from antefix_billing.ledger import Ledger
from antefix_billing.peer_ledgers import PeerLedgers
from antefix_billing.ratecard import RateCards, load_cards
from antefix_billing.receipt import Signer
from antefix_billing.request_account import RunningAt
from antefix_billing.tenants import TenantBook, load_tenants
from antefix_billing.usage_commit import LedgerWriter
from antefix_router.accounting import Accounts
from antefix_router.anchoring import Anchoring
from antefix_router.answers import RetryConfig, Run
from antefix_router.encoding import Encoding
from antefix_router.generation import Generator, OutputPiece
from antefix_router.grammar_check import GrammarCheck
from antefix_router.load_shedding import LoadShedding, until_served
from antefix_router.open_bill import Bill, Served
from antefix_router.shared_bill.bill_exchange import BillExchange
from antefix_router.shared_bill.shared_bill import SharedBill
from antefix_router.shared_bill.shared_quotas import SharedQuotas
from antefix_router.volatile_prefix import PrefixWatch

REQUEST_ID_BYTES_MAX = 256
TENANT_BYTES_MAX = 512
# Each output of a request takes a place at a decode worker.
NUM_SAMPLES_MAX = 16


class ContextTooLong(InvalidRequest):
    """Prompt and output together do not fit into the model's context. The caller must shorten the prompt or the
    output.
    """


@dataclass(frozen=True, slots=True, kw_only=True)
class BillingConfig(RetryConfig):
    """Settings of a router's bill."""

    ledger_dir: str = setting("", "directory of the usage ledger; without a ledger nothing is billed")
    ratecards: tuple[str, ...] = setting(
        (), "rate card files (TOML), separated by commas; without a rate card all requests are free"
    )
    tenants_file: str = setting("", "TOML file with tenants' limits and API keys", guards=True)
    api_keys_file: str = setting(
        "",
        "file with API keys, made by `antefix keys`; without this file and tenants_file, callers need no key",
        guards=True,
    )
    keys_redis: str = setting("", "Redis URL through which changes of API keys reach all routers", guards=True)
    redis_password_file: str = redis_password_setting()
    redis_ca_file: str = redis_ca_setting()
    bill_redis: str = setting(
        "",
        "Redis URL through which routers share request ids, limits and receipts; empty: this router shares nothing",
        guards=True,
    )
    bill_keep_s: float = setting(
        7 * 86400.0, "how long requests of one router stay in that Redis for the others", unit="s"
    )
    bill_alone: str = setting(
        "refuse",
        "what to do with requests that have a client's id while Redis is out: refuse them, or serve them (if two"
        " routers charge a request, one charge is credited later)",
        choices=("refuse", "serve"),
    )
    peer_ledgers: tuple[str, ...] = setting(
        (), "ledger directories of other routers on this host, whose requests this router answers questions about too"
    )
    anchors: tuple[str, ...] = setting(
        (),
        "where to write the ledger's signed head: files outside the ledger's directory, file:// directories, or"
        " object stores (s3://, gs://, az://)",
    )
    anchor_s: float = setting(60.0, "how often", unit="s")
    receipt_key_file: str = setting("", "Ed25519 key that signs receipts, made if missing (default: in ledger_dir)")

    def __post_init__(self) -> None:
        RetryConfig.__post_init__(self)
        require(bool(self.ledger_dir) or not self.receipt_key_file, "--receipt-key-file needs --ledger-dir")
        require(bool(self.ledger_dir) or not self.bill_redis, "--bill-redis needs --ledger-dir")
        if self.bill_redis:
            check_redis_url(self.bill_redis, "bill_redis")
        require(bool(self.ledger_dir) or not self.anchors, "--anchors needs --ledger-dir")
        require(self.anchor_s > 0, f"anchor_s must be positive, is {self.anchor_s}")
        for place in self.anchors:
            check_place(place)
        require(self.bill_keep_s > 0, f"bill_keep_s must be positive, is {self.bill_keep_s}")
        require(bool(self.api_keys_file) or not self.keys_redis, "--keys-redis needs --api-keys-file")


class BilledFront:
    """The part that gRPC and HTTP have in common: authentication, the bill, receipts. run: generates the output of an
    admitted request.
    """

    def __init__(self, run: Run, accounts: Accounts, *, keys: KeyRegister, signer: Signer | None) -> None:
        self.accounts = accounts
        self.keys = keys
        self.signer = signer
        # The path of the receipt key, so that a rotated key can be loaded while the router runs.
        self.signer_path = signer.path if signer is not None else None
        self.prefixes = PrefixWatch()
        self._run = run

    def run(self, bill: Bill, timeout_s: float) -> AsyncGenerator[OutputPiece, None]:
        """The output; when the output ends, the record in `bill.record` is on disk. Closing the output early cancels
        the request.
        """
        return self.accounts.run(bill, self._run, timeout_s)

    def take_signer(self, signer: Signer) -> None:
        """Sign receipts and anchors with this key from now on."""
        self.signer = signer
        if self.accounts.anchoring is not None:
            self.accounts.anchoring.signer = signer

    def start(self) -> None:
        """Share the bill with other routers, if the settings say so."""
        if self.accounts.shared is not None:
            self.accounts.shared.start()
        if self.accounts.anchoring is not None:
            self.accounts.anchoring.start()

    async def close(self) -> None:
        """Write the records of all requests that are running."""
        await self.accounts.close()


class Front(BilledFront):
    """The `BilledFront` that uses our own prefill and decode workers, not another engine's."""

    def __init__(
        self,
        generator: Generator,
        accounts: Accounts,
        *,
        identity: ModelIdentity,
        tokenizer: Tokenizer,
        tenants: TenantBook,
        signer: Signer | None,
        keys: KeyRegister | None = None,
        shedding: LoadShedding | None = None,
    ) -> None:
        """keys: None: the API keys are those in `tenants`. shedding: None: no request is refused because its wait would
        be long.
        """
        # Looked up at each request, because a dry run has no generator.
        super().__init__(
            lambda *args: generator.run(*args), accounts, keys=keys or key_register(tenants), signer=signer
        )
        self.identity = identity
        self.tokenizer = tokenizer
        self.tenants = tenants
        self.encoding = Encoding()
        self.grammars = GrammarCheck(identity.path, identity.vocab_size)
        self.shedding = shedding or LoadShedding(0.0, lambda: 1)
        self.shedding.share_of = lambda tenant: accounts.quotas.limits_of(tenant).share

    def check_text(self, num_characters: int, *, num_plain: int | None = None, payer: str | None = None) -> None:
        """Check a prompt before it is encoded, by the smallest number of tokens that its text can have.

        num_plain: characters of text in which nothing is a special token; None: special tokens may occur anywhere.
        payer: the tenant whose quota must cover the tokens.
        Raises:  ContextTooLong.  QuotaExceeded: the tenant has fewer tokens left.
        """
        tokenizer = self.tokenizer
        if num_plain is None:
            longest, num = tokenizer.token_characters_max, num_characters
        else:
            longest, num = tokenizer.plain_characters_max, num_plain
        at_least = num // longest if longest else 0
        if at_least > self.identity.max_tokens:
            raise ContextTooLong(
                f"the prompt is too long: its {num} characters are at least {at_least} tokens, more than the model's"
                f" context length of {self.identity.max_tokens}"
            )
        if payer is not None:
            self.accounts.quotas.check(payer, tokens=at_least, now=datetime.now(UTC))

    async def admit(self, request: GenerationRequest, *, retryable: bool = False) -> Bill:
        """Check a request and open its bill. A request without an id gets one here. retryable: see `Accounts.admit`.

        Raises:  InvalidRequest: the request itself is wrong.  QuotaExceeded, Conflict: see `Accounts.admit`.
        """
        caller = request.caller
        for name, text, nbytes_max in (
            ("request_id", caller.request_id, REQUEST_ID_BYTES_MAX),
            ("tenant", caller.tenant, TENANT_BYTES_MAX),
            ("user", caller.user, TENANT_BYTES_MAX),
            ("session", caller.session, TENANT_BYTES_MAX),
        ):
            if len(text.encode()) > nbytes_max:
                raise InvalidRequest(f"{name} takes {nbytes_max} bytes")
        cache_tenant(caller.tenant, caller.user)
        self._check_tokens(request.tokens, request.sampling.max_tokens)
        request.sampling.check_vocabulary(self.identity.vocab_size)
        check_samples(request)
        if request.sampling.grammar:
            await self.grammars.check(request.sampling.grammar)
        request = replace(request, share=self.accounts.quotas.limits_of(caller.tenant).share)
        is_named = caller.is_named
        if not caller.request_id:
            request = replace(request, caller=replace(caller, request_id=secrets.token_hex(12)))
        bill = await self.accounts.admit(request, retryable=retryable, is_named=is_named)
        bill.prefix_volatile = self.prefixes.note(request.cache_tenant, request.tokens)
        return bill

    def run(self, bill: Bill, timeout_s: float) -> AsyncGenerator[OutputPiece, None]:
        """As `BilledFront.run`. From its first output on, the request no longer counts as waiting."""
        return until_served(super().run(bill, timeout_s))

    async def close(self) -> None:
        """Write the records of all requests that are running, and stop the process that checks grammars."""
        await super().close()
        await self.grammars.close()

    def _check_tokens(self, tokens: Tokens, max_tokens: int) -> None:
        if len(tokens) == 0:
            raise InvalidRequest("the prompt is empty")
        if len(tokens) + max_tokens > self.identity.max_tokens:
            raise ContextTooLong(
                f"the prompt is too long: {len(tokens)} tokens and max_tokens {max_tokens} are more than the model's"
                f" context length of {self.identity.max_tokens}"
            )
        if int(tokens.max()) >= self.identity.vocab_size:
            raise InvalidRequest(
                f"token id {int(tokens.max())} is outside the vocabulary of {self.identity.vocab_size}"
            )


def cache_tenant(tenant: str, user: str) -> str:
    """The name of the cache that a request may hit: its tenant's, or that of one of the tenant's users."""
    for text in (tenant, user):
        # Control characters are refused: one of them separates the two parts of a cache's name, and others would move
        # the cursor of a terminal that shows a bill.
        if CONTROL.search(text):
            raise InvalidRequest("tenant and user may not hold control characters")
    return join_tenant(tenant, user)


def check_samples(request: GenerationRequest) -> None:
    """Raises:  WrongSetting: more outputs than allowed, or several outputs that would all be the same."""
    if not 1 <= request.num_samples <= NUM_SAMPLES_MAX:
        raise WrongSetting("n", f"must be from 1 to {NUM_SAMPLES_MAX}, is {request.num_samples}")
    if request.num_samples > 1 and request.sampling.temperature == 0.0:
        raise WrongSetting("n", "must be 1 when using greedy sampling: all outputs would be the same")


def open_front(
    config: BillingConfig,
    generator: Generator,
    *,
    identity: ModelIdentity,
    tokenizer: Tokenizer,
    keyring: Keyring,
    fingerprint: bytes,
    shedding: LoadShedding,
) -> Front:
    """Raises:  ConfigError: a file or directory in the settings cannot be used.  LedgerCorrupt: the ledger was damaged
    or edited.
    """
    accounts, tenants, keys, signer = open_books(config, keyring)
    accounts.served = Served(model=identity.name, revision=identity.weights_revision, fingerprint=fingerprint.hex())
    return Front(
        generator,
        accounts,
        identity=identity,
        tokenizer=tokenizer,
        tenants=tenants,
        signer=signer,
        keys=keys,
        shedding=shedding,
    )


def open_books(config: BillingConfig, keyring: Keyring) -> tuple[Accounts, TenantBook, KeyRegister, Signer | None]:
    """Open the accounts, tenants, keys and signer that the settings name. The accounts do not depend on a model.
    Raises: as `open_front`.
    """
    has_keys = bool(config.api_keys_file)
    tenants = load_tenants(config.tenants_file, has_other_keys=has_keys) if config.tenants_file else TenantBook()
    keys = key_register(tenants, needed=has_keys)
    if config.api_keys_file:
        keys.take(read_book(config.api_keys_file))
    cards = load_cards(config.ratecards) if config.ratecards else RateCards()
    ledger = Ledger(config.ledger_dir) if config.ledger_dir else None
    served = Served(model="", revision="", fingerprint="")
    accounts = Accounts(
        ledger,
        served=served,
        keyring=keyring,
        cards=cards,
        tenants=tenants,
        retries=config,
        peers=PeerLedgers([Path(path) for path in config.peer_ledgers]),
    )
    if config.bill_redis:
        accounts.shared = share_bill(config, accounts, keyring)
    if ledger is None:
        return accounts, tenants, keys, None
    signer = Signer.create(Path(config.receipt_key_file or ledger.directory / "receipts.key"))
    if config.anchors:
        accounts.anchoring = Anchoring(ledger, signer, config.anchors, config.anchor_s)
    return accounts, tenants, keys, signer


def share_bill(config: BillingConfig, accounts: Accounts, keyring: Keyring) -> SharedBill:
    """The bill that is shared with other routers, by the settings. Call `start` on it."""
    writer = accounts.writer
    assert isinstance(writer, LedgerWriter)
    exchange = BillExchange(RedisAccess.of(config.bill_redis, config), keyring, keep_s=config.bill_keep_s)
    me = RunningAt(source=writer.source_name, instance=secrets.token_hex(8))
    quotas = SharedQuotas(exchange, accounts.quotas, me.source)
    serves_alone = config.bill_alone == "serve"
    return SharedBill(exchange, writer, quotas, me, keep_s=config.bill_keep_s, serves_alone=serves_alone)


def key_register(tenants: TenantBook, *, needed: bool = False) -> KeyRegister:
    """The register of the keys in a tenants file. needed: whether there are other keys as well."""
    return KeyRegister(named=tenants.keys, open_as="" if is_open_to_all(tenants, needed=needed) else None)


def is_open_to_all(tenants: TenantBook, *, needed: bool) -> bool:
    """Whether callers need no API key. needed: whether there are keys besides those of the tenants file."""
    return not (needed or tenants.needs_keys or tenants.keys)
