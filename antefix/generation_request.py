"""One request for an output, as it travels from a door to the workers: made once, handed on, never taken apart."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from antefix.block import TokenArray as Tokens
from antefix.errors import InvalidRequest
from antefix.sampling import Sampling


def check_text(what: str, text: str) -> None:
    """Raises:  InvalidRequest: UTF-8 cannot write it, as half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError as err:
        raise InvalidRequest(f"{what} is not text: UTF-8 cannot write its character {err.start}") from err


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """Who asks. tenant: who pays, and whose cache it is; user: has a cache of its own within the tenant's.

    request_id: the same one again is a retry; empty: one is made.
    session: the caller's name of the conversation, a hint where to place it.
    key_id: of the API key that was shown, for the bill.
    Raises:  InvalidRequest: one of them cannot be written as UTF-8, and so neither sent, hashed nor billed.
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
        """Whether its client chose the id, and so may send it again, also to another router."""
        return bool(self.request_id)

    @property
    def cache_tenant(self) -> str:
        """Whose blocks may be hit. U+001F separates the two; no door lets control characters through."""
        return f"{self.tenant}\x1f{self.user}" if self.user else self.tenant


class Breakpoint(NamedTuple):
    """A client's cache breakpoint: the prompt's first `num_tokens` are to be kept for `ttl_s` seconds."""

    num_tokens: int
    ttl_s: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GenerationRequest:
    """tokens: the prompt.  breakpoints: prefixes that the client wants kept.

    num_samples: outputs over the one prompt; each has a seed of its own.
    model: which one, where there are several.  content: what else decides the answer, beyond tokens and sampling.
    num_tokens_about: of a prompt whose tokens nobody could tell, at least as many.
    share: its tenant's, of workers that others want too, next to theirs.
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
        """Of the prompt, as far as it is known."""
        return len(self.tokens) or self.num_tokens_about

    @property
    def request_id(self) -> str:
        return self.caller.request_id

    @property
    def is_named(self) -> bool:
        """Whether its client chose the id, and so may send it again, also to another router."""
        return bool(self.request_id)

    @property
    def cache_tenant(self) -> str:
        return self.caller.cache_tenant

    def followed_by(self, emitted: Iterable[int]) -> Tokens:
        """[N] uint32: the prompt and what was given out of one of its outputs."""
        return np.concatenate((self.tokens, np.fromiter(emitted, np.uint32)))
