"""Names the blocks of prompts. When a conversation grows, only its new part is hashed.

Hashing 128K tokens takes longer than the rest of placement together, and most of these tokens were in the previous
turn. So recent prompts are kept in memory with their hashes, up to a limit. A prompt that begins like a prompt in
memory reuses its hashes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import xxhash

from antefix.block import Chain
from antefix.clients import Tokens
from antefix.events.block_events import Key, keys_of
from antefix.located import Located
from antefix.secret import Keyring
from antefix.security.grants import Granter
from antefix_router.placement.work import Work

# How long a grant lasts if the request has no time limit.
GRANT_S = 600.0
# Tokens of all kept prompts together: a hundred conversations of 160K tokens.
_MEMO_TOKENS_MAX = 1 << 24
# Shorter prompts than this many blocks are hashed faster than they are looked up.
_MEMO_BLOCKS_MIN = 8
# Baseline policies place by the hash of this many blocks.
_HEAD_BLOCKS = 2
# The most runs of a prompt's stored blocks (by the stores that hold them) that placement considers.
_NUM_RUNS_MAX = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedPrompt:
    """A named prompt. keys: the keys of its blocks in the directory. replay_tokens: the model's number, for `Work`.

    owner: stands for the tenant in the store. grant: the permission that workers and the store demand; empty: they
    demand none.
    """

    tokens: Tokens
    tenant: str
    owner: bytes
    chain: Chain
    keys: Sequence[Key]
    replay_tokens: int = 0
    grant: bytes = b""

    def work(self, num_stored_blocks: int | None, known_tokens: int = 0, *, located: Located | None = None) -> Work:
        """The prompt's work, given how many leading blocks the store holds; None if the store did not answer.

        located: which of several stores holds which of the blocks.
        """
        num_tokens, size = len(self.tokens), self.chain.block_size
        stored = None if num_stored_blocks is None else min(num_stored_blocks * size, num_tokens - 1)
        first_unseen = min(max(num_stored_blocks or 0, known_tokens // size), len(self.keys) - 1)
        head = self.keys[min(_HEAD_BLOCKS, len(self.keys)) - 1] if self.keys else 0
        return Work(
            num_tokens=num_tokens,
            stored_tokens=stored,
            affinity=self.keys[first_unseen] if self.keys else _key(self.tokens),
            head=head,
            replay_tokens=self.replay_tokens,
            places=_places(located, num_stored_blocks or 0, size),
        )


@dataclass(slots=True)
class PromptNames:
    """Names prompts' blocks.  granter: returns the signer of each prompt's grant; None: grants are not used."""

    fingerprint: bytes
    keyring: Keyring
    block_size: int
    replay_tokens: int = 0
    granter: Callable[[], Granter | None] = lambda: None
    _memo: _Memo = field(init=False)

    def __post_init__(self) -> None:
        self._memo = _Memo(self.block_size)

    def prompt(self, tenant: str, tokens: Tokens, *, timeout_s: float = GRANT_S) -> NamedPrompt:
        """timeout_s: for how many seconds the prompt's grant must be valid."""
        chain = Chain(self.fingerprint, self.keyring.key(tenant), self.block_size)
        beginnings = self._memo.beginnings(tenant, tokens)
        known = self._memo.hashes(tenant, tokens, beginnings)
        chain.hashes = known
        chain.num_tokens = len(known) * self.block_size
        chain.extend(tokens[chain.num_tokens :])
        self._memo.keep(tenant, tokens, chain.hashes, beginnings)
        keys = keys_of(chain.hashes)
        return NamedPrompt(
            tokens=tokens,
            tenant=tenant,
            owner=self.keyring.owner(tenant),
            chain=chain,
            keys=keys,
            replay_tokens=self.replay_tokens,
            grant=self._grant(tenant, tokens, timeout_s),
        )

    def _grant(self, tenant: str, tokens: Tokens, timeout_s: float) -> bytes:
        granter = self.granter()
        return b"" if granter is None else granter.grant_for(self.keyring, tenant, tokens, ttl_s=timeout_s)


class _Memo:
    """Prompts and their hashes, found by fast hashes of their first 1, 2, 4, ... blocks. The tokens of two prompts are
    then compared in full.

    The fast hash is only used to find candidates. Hashes are reused only if all tokens are equal and the tenant is the
    same.
    """

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._kept: OrderedDict[int, tuple[str, Tokens, list[bytes], list[int]]] = OrderedDict()
        self._by_beginning: dict[int, int] = {}
        self._num_tokens = 0
        self._next = 0

    def hashes(self, tenant: str, tokens: Tokens, beginnings: Sequence[int]) -> list[bytes]:
        """The hashes of the leading blocks shared with a kept prompt, from the kept prompt that shares most."""
        for beginning in reversed(beginnings):
            found = self._kept.get(self._by_beginning.get(beginning, -1))
            if found is None or found[0] != tenant:
                continue
            shared = min(len(tokens), len(found[1]))
            differs = tokens[:shared] != found[1][:shared]
            first = int(differs.argmax())
            num_blocks = (first if differs[first] else shared) // self._block_size
            return found[2][:num_blocks]
        return []

    def keep(self, tenant: str, tokens: Tokens, hashes: list[bytes], beginnings: list[int]) -> None:
        if not beginnings:
            return
        # Drop the conversation's previous turn: its blocks are a prefix of this prompt's, so it adds nothing.
        number = self._by_beginning.get(beginnings[-1], -1)
        older = self._kept.get(number)
        if older is not None and older[2] == hashes[: len(older[2])]:
            self._drop(number)
        self._next += 1
        self._kept[self._next] = (tenant, tokens[: len(hashes) * self._block_size], list(hashes), beginnings)
        self._by_beginning.update(dict.fromkeys(beginnings, self._next))
        self._num_tokens += len(hashes) * self._block_size
        while self._num_tokens > _MEMO_TOKENS_MAX and len(self._kept) > 1:
            self._drop(next(iter(self._kept)))

    def _drop(self, number: int) -> None:
        _, tokens, _, beginnings = self._kept.pop(number)
        self._num_tokens -= len(tokens)
        for beginning in beginnings:
            if self._by_beginning.get(beginning) == number:
                del self._by_beginning[beginning]

    def beginnings(self, tenant: str, tokens: Tokens) -> list[int]:
        """Fast hashes of the first 1, 2, 4, ... blocks; no hashes for a prompt that is too short."""
        if len(tokens) < _MEMO_BLOCKS_MIN * self._block_size:
            return []
        seed = xxhash.xxh3_64_intdigest(tenant.encode())
        digest = xxhash.xxh3_64(seed=seed)
        raw = np.ascontiguousarray(tokens).data.cast("B")
        block_bytes, num_blocks, found = 4 * self._block_size, 1, []
        while num_blocks * self._block_size <= len(tokens):
            # Only the last block of each beginning is hashed, because a find is compared in full.
            digest.update(raw[(num_blocks - 1) * block_bytes : num_blocks * block_bytes])
            found.append(digest.intdigest())
            num_blocks *= 2
        return found


def _places(located: Located | None, num_blocks: int, block_size: int) -> tuple[tuple[int, frozenset[str]], ...]:
    """The last run stands for all later ones, so that a prompt spread over many stores does not slow placement."""
    if located is None:
        return ()
    runs = located.parts(num_blocks)
    runs, rest = runs[: _NUM_RUNS_MAX - 1], runs[_NUM_RUNS_MAX - 1 :]
    if rest:
        runs.append((sum(blocks for blocks, _ in rest), rest[0][1]))
    return tuple((blocks * block_size, stores) for blocks, stores in runs)


def _key(tokens: Tokens) -> int:
    return xxhash.xxh3_64_intdigest(np.ascontiguousarray(tokens).tobytes())
