"""`antefix verify --engine transformers`: compares cold runs with restored ones bit by bit, and plants faults.

A cold run computes the same chunks without a store. After a restore, the next block is computed, and its logits and
stored bytes are compared. Each group of KV affects the next block's logits or its stored bytes. A planted fault reads
one group as zeros, and the comparison must detect it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
import transformers
from torch import Tensor

from antefix.errors import ModelError
from antefix_engines.engine_layout import views_of
from antefix_engines.engine_store import EngineStore, StoreSettings
from antefix_engines.transformers.antefix_cache import BLOCK_SIZE, AntefixCache
from antefix_engines.transformers.small_models import BLOCK_SIZE as SMALL_BLOCK_SIZE
from antefix_engines.transformers.small_models import SMALL, small_model
from antefix_engines.transformers.stored_prefix import read_prefix
from antefix_engines.verify import CheckRequest, Finding

_NUM_BLOCKS: Final = 5
_NUM_GENERATED: Final = 4
_DTYPES: Final = (torch.float32, torch.bfloat16)


@dataclass(slots=True)
class ColdRun:
    """A prompt computed block by block without a store. logits, blocks, checkpoints: of each block."""

    logits: list[Tensor] = field(default_factory=list)
    blocks: list[bytes] = field(default_factory=list)
    checkpoints: list[bytes] = field(default_factory=list)


def findings(request: CheckRequest) -> Iterator[Finding]:
    """All checks of the small models in float32 and bfloat16, or only those of the model that was given."""
    for number, (name, model, block_size) in enumerate(_subjects(request)):
        settings = StoreSettings(directory=str(request.scratch / f"{number}"), budget_bytes="1G")
        checks = ModelChecks(name, model, settings, block_size=block_size, seed=request.seed)
        yield from checks.run()


def _subjects(request: CheckRequest) -> Iterator[tuple[str, Any, int]]:
    if request.model is not None:
        try:
            model = transformers.AutoModelForCausalLM.from_pretrained(str(request.model)).eval()
        except (OSError, ValueError) as err:
            raise ModelError(f"transformers cannot load {request.model}: {err}") from err
        yield request.model.name, model, BLOCK_SIZE
        return
    for name in SMALL:
        for dtype in _DTYPES:
            model = small_model(name, seed=request.seed, dtype=dtype)
            yield f"{name}, {str(dtype).removeprefix('torch.')}", model, SMALL_BLOCK_SIZE


class ModelChecks:
    """The checks of one model over one store, which is opened and closed between them."""

    def __init__(self, subject: str, model: Any, settings: StoreSettings, *, block_size: int, seed: int) -> None:
        self.subject: Final = subject
        self.model: Final = model
        self.block_size: Final = block_size
        self._settings: Final = settings
        draw = random.Random(seed)
        vocab_size = model.config.get_text_config(decoder=True).vocab_size
        self.prompt: Final = [draw.randrange(vocab_size) for _ in range(_NUM_BLOCKS * block_size + 3)]
        # The second prompt differs from the first from the middle of its third block on.
        at = 2 * block_size + block_size // 2
        self.fork: Final = [*self.prompt[:at], *reversed(self.prompt[at:])]

    def run(self) -> Iterator[Finding]:
        with self._open() as store, self._cache(store) as cache:
            cold = self.cold_run(cache, self.prompt)
            cache.prefill(self.model, self.prompt)
            for num_blocks in range(_NUM_BLOCKS):
                yield self._boundary(cache, cold, num_blocks)
            yield self._fork(cache)
            for group in sorted({part.group for part in (*cache.layout.block, *cache.layout.checkpoint)}):
                yield self._planted(cache, cold, group)
            yield self._other_weights(cache)
        with self._open() as store, self._cache(store) as cache:
            yield self._compared("the store opened again", cache, cold, _NUM_BLOCKS - 1)
        _damage(Path(self._settings.directory) / "store" / "segments")
        with self._open() as store, self._cache(store) as cache:
            yield self._damaged(cache, cold)

    def cold_run(self, cache: AntefixCache, prompt: Sequence[int]) -> ColdRun:
        """Every whole block of a prompt, computed without a store."""
        run, past = ColdRun(), transformers.DynamicCache(config=self.model.config)
        for index in range(len(prompt) // self.block_size):
            self._pass(cache, past, prompt, index, run)
        return run

    def _open(self) -> EngineStore:
        return EngineStore.open(self._settings)

    def _cache(self, store: EngineStore) -> AntefixCache:
        return AntefixCache(self.model, store, block_size=self.block_size)

    def _pass(self, cache: AntefixCache, past: Any, prompt: Sequence[int], index: int, into: ColdRun) -> None:
        end = (index + 1) * self.block_size
        ids = torch.tensor([list(prompt[end - self.block_size : end])], device=self.model.device)
        with torch.no_grad():
            into.logits.append(self.model(input_ids=ids, past_key_values=past, use_cache=True).logits)
        into.blocks.append(bytes(cache.payloads.block(past, index)))
        into.checkpoints.append(bytes(cache.payloads.checkpoint(past, index, end) or b""))

    def _difference(self, cache: AntefixCache, past: Any, cold: ColdRun, index: int, prompt: Sequence[int]) -> str:
        """Where computing block `index` after the cache `past` differs from the cold run; empty if it differs
        nowhere.
        """
        run = ColdRun()
        self._pass(cache, past, prompt, index, run)
        if not torch.equal(run.logits[0], cold.logits[index]):
            largest = (run.logits[0] - cold.logits[index]).abs().max()
            return f"logits of block {index} differ by up to {float(largest):.3g}"
        if run.blocks[0] != cold.blocks[index]:
            return f"the KV of block {index} differs"
        return "" if run.checkpoints[0] == cold.checkpoints[index] else f"the state after block {index} differs"

    def _compared(self, check: str, cache: AntefixCache, cold: ColdRun, num_blocks: int) -> Finding:
        """Restore a prompt that ends just after a boundary, and compare the next block."""
        past = cache.restore(self.prompt[: num_blocks * self.block_size + 1])
        assert past.report is not None
        cached = past.report.num_cached_tokens
        told = "" if cached == num_blocks * self.block_size else f"{cached} tokens restored: {past.report.why}"
        told = told or self._difference(cache, past, cold, num_blocks, self.prompt)
        return self._finding(check, told, cached=cached)

    def _boundary(self, cache: AntefixCache, cold: ColdRun, num_blocks: int) -> Finding:
        found = self._compared(f"boundary {num_blocks}", cache, cold, num_blocks)
        if not found.is_right:
            return found
        prompt = torch.tensor([self.prompt[: num_blocks * self.block_size + 3]], device=self.model.device)
        past = transformers.DynamicCache(config=self.model.config)
        for index in range(num_blocks):
            self._pass(cache, past, self.prompt, index, ColdRun())
        expected, tokens = (self._generate(prompt, each) for each in (past, cache.restore(prompt)))
        told = "" if torch.equal(expected, tokens) else f"generate gives {tokens.tolist()}, cold {expected.tolist()}"
        return self._finding(found.check, told, cached=found.num_cached)

    def _generate(self, prompt: Tensor, past: Any) -> Tensor:
        ids: Tensor = self.model.generate(prompt, past_key_values=past, max_new_tokens=_NUM_GENERATED, do_sample=False)
        return ids[0, prompt.shape[1] :]

    def _fork(self, cache: AntefixCache) -> Finding:
        past = cache.restore(self.fork)
        assert past.report is not None
        cold = self.cold_run(cache, self.fork)
        cached = past.report.num_cached_tokens
        told = "" if cached == 2 * self.block_size else f"{cached} tokens restored: {past.report.why}"
        for index in range(cached // self.block_size, _NUM_BLOCKS):
            told = told or self._difference(cache, past, cold, index, self.fork)
        return self._finding("a fork in block 2", told, cached=cached)

    def _planted(self, cache: AntefixCache, cold: ColdRun, group: str) -> Finding:
        """Check that reading one group as zeros is detected."""
        at, kv, payloads = _NUM_BLOCKS - 1, cache.kv, cache.payloads
        prefix = read_prefix(kv, kv.chain(self.prompt), at)
        layout = payloads.layout
        for raw, parts in ((prefix.blocks, layout.block), (prefix.checkpoints, layout.checkpoint)):
            size = sum(part.nbytes for part in parts)
            for start in range(0, len(raw) if size else 0, max(size, 1)):
                for part, view in views_of(memoryview(raw)[start : start + size], parts):
                    if part.group == group:
                        view[:] = bytes(part.nbytes)
        past = cache.empty_cache()
        payloads.fill(past, prefix.blocks, prefix.checkpoints, at)
        told = self._difference(cache, past, cold, at, self.prompt)
        return self._finding(f"{group} read as zeros", told, cached=at * self.block_size, is_planted=True)

    def _other_weights(self, cache: AntefixCache) -> Finding:
        """Check that changing one number of one weight makes all blocks misses."""
        weight = next(self.model.parameters())
        with torch.no_grad():
            before = weight.flatten()[0].clone()
            weight.view(-1)[0] += 1
            report = cache.restore(self.prompt).report
            weight.view(-1)[0] = before
        assert report is not None
        told = "" if report.num_cached_tokens == 0 else "KV of other weights was restored"
        return self._finding("other weights", told, cached=report.num_cached_tokens)

    def _damaged(self, cache: AntefixCache, cold: ColdRun) -> Finding:
        past = cache.restore(self.prompt)
        assert past.report is not None
        cached = past.report.num_cached_tokens
        told = "" if cached < _NUM_BLOCKS * self.block_size else "nothing was lost, so nothing was tried"
        for index in range(cached // self.block_size, _NUM_BLOCKS):
            told = told or self._difference(cache, past, cold, index, self.prompt)
        return self._finding("a damaged store", told, cached=cached)

    def _finding(self, check: str, told: str, *, cached: int, is_planted: bool = False) -> Finding:
        return Finding(
            subject=self.subject,
            check=check,
            is_right=bool(told) == is_planted,
            is_planted=is_planted,
            num_tokens=len(self.prompt),
            num_cached=cached,
            told=told if told or not is_planted else "nothing differed",
        )


def _damage(segments: Path) -> None:
    """Flip bits throughout the second half of the segments."""
    for path in segments.glob("*.seg"):
        content = bytearray(path.read_bytes())
        end = len(content.rstrip(b"\0"))
        for at in range((4096 + end) // 2, end, max(end // 64, 1)):
            content[at] ^= 0x10
        path.write_bytes(bytes(content))
