"""One request for an output, as it passes from the HTTP or gRPC API to the workers. A generation request is made once
and never changed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from antefix.block import TokenArray as Tokens
from antefix.errors import InvalidRequest
from antefix.sampling import Sampling


def check_text(what: str, text: str) -> None:
    """Raises:  InvalidRequest: the text cannot be encoded as UTF-8, for example half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError as err:
        raise InvalidRequest(f"{what} is not text: UTF-8 cannot encode its character {err.start}") from err


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """Who sends a request.

    tenant: who pays; without a user, also the owner of the cache.  user: an end user of the tenant, with a separate
    cache.  request_id: a request with the same id is a retry; empty: an id is made.
    session: the caller's name of the conversation, a hint for placing the request.
    key_id: the id of the API key that was used, for the bill.
    Raises:  InvalidRequest: a field cannot be encoded as UTF-8, so it could not be sent, hashed or billed.
    """

    tenant: str = ""
    user: str = ""
    request_id: str = ""
    session: str = ""
    key_id: str = ""

    def __post_init__(self) -> None:
        for name in ("tenant", "user", "request_id", "session"):
            check_text(name, getattr(self, name))

    @property
    def is_named(self) -> bool:
        """Whether the request's client chose the id, and so may send the request again, also to another router."""
        return bool(self.request_id)

    @property
    def cache_tenant(self) -> str:
        """The owner of the blocks that may be hit: tenant and user, separated by U+001F. The HTTP and gRPC APIs refuse
        control characters in tenant and user.
        """
        return f"{self.tenant}\x1f{self.user}" if self.user else self.tenant


class Breakpoint(NamedTuple):
    """A client's cache breakpoint: the prompt's first `num_tokens` are to be kept for `ttl_s` seconds."""

    num_tokens: int
    ttl_s: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GenerationRequest:
    """tokens: the prompt.  breakpoints: prefixes that the client wants kept.

    num_samples: how many outputs to generate for the prompt; each has its own seed.
    model: the model's name, where there are several.  content: anything besides tokens and sampling that decides the
    answer.  num_tokens_about: a lower bound of the prompt's length, where its tokens are not known.
    share: the tenant's weight when tenants compete for workers.
    """

    tokens: Tokens
    sampling: Sampling
    caller: Caller = field(default_factory=Caller)
    breakpoints: tuple[Breakpoint, ...] = ()
    num_samples: int = 1
    model: str = ""
    content: bytes = b""
    num_tokens_about: int = 0
    share: int = 1

    @property
    def num_tokens(self) -> int:
        """The prompt's length in tokens, or `num_tokens_about` where its tokens are not known."""
        return len(self.tokens) or self.num_tokens_about

    @property
    def request_id(self) -> str:
        return self.caller.request_id

    @property
    def is_named(self) -> bool:
        """Whether the request's client chose the id, and so may send the request again, also to another router."""
        return bool(self.request_id)

    @property
    def cache_tenant(self) -> str:
        return self.caller.cache_tenant

    def followed_by(self, emitted: Iterable[int]) -> Tokens:
        """[N] uint32: the prompt, followed by the tokens of one output that were already sent."""
        return np.concatenate((self.tokens, np.fromiter(emitted, np.uint32)))
