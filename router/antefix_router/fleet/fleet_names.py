"""Gives names to other engines' blocks: their token ids are hashed in the same way as prompts, so that the two can be
compared.

Names are keyed with the deployment's secret and never leave the process. A *scope* stands for everything besides tokens
that has to match: the adapter, and the salt under which the engine keeps the cache.
"""

from __future__ import annotations

from typing import Final

from antefix.block import Chain, Tokens, as_tokens, digest_of
from antefix.secret import Keyring
from antefix_router.naming import NamedPrompt, PromptNames

_FINGERPRINT: Final = digest_of(b"antefix-fleet")
# Separates the adapter from the salt. The adapter's name cannot contain it.
_SEPARATOR: Final = "\x1e"


def scope_of(*, lora: str = "", salt: str = "") -> str:
    return f"{lora}{_SEPARATOR}{salt}" if lora or salt else ""


class FleetNames:
    """The names within one router."""

    def __init__(self, keyring: Keyring) -> None:
        self._keyring = keyring
        self._by_size: dict[int, PromptNames] = {}

    def prompt(self, tokens: Tokens, scope: str, block_size: int) -> NamedPrompt:
        """The prompt of a request, named in blocks of this size."""
        names = self._by_size.get(block_size)
        if names is None:
            names = PromptNames(fingerprint=_FINGERPRINT, keyring=self._keyring, block_size=block_size)
            self._by_size[block_size] = names
        return names.prompt(scope, as_tokens(tokens))

    def continued(self, parent: bytes | None, tokens: Tokens, scope: str, block_size: int) -> list[bytes]:
        """The names of the whole blocks after the block `parent`; None: of the blocks from the beginning on."""
        chain = Chain(_FINGERPRINT, self._keyring.key(scope), block_size)
        if parent is not None:
            chain.hashes = [parent]
        return chain.extend(tokens)
