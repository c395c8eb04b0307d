"""Text to token ids and back: a Hugging Face tokenizer directory, or plain bytes for the small model.

Both kinds of tokenizer decode their own tokens exactly: decode(encode(text)) equals text. So an answer that a client
sends again can hit the cache. Never sees tensors.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from antefix.errors import InvalidRequest, ModelError
from antefix.tokenizer_files import NUM_BYTES, check_tokenizer_file, eos_ids_of, library_errors, special_tokens_of


class Tokenizer(Protocol):
    """The interface of a tokenizer, as the services use it."""

    eos_ids: frozenset[int]
    # Tokens that are not text, such as turn markers and padding. Markup that is part of the text is not among them.
    special_ids: frozenset[int]
    # Ids from this number on stand for nothing, although a model may have logits for them.
    num_tokens: int
    # The most characters that one token stands for, in any text and in text without special tokens. 0: not known.
    token_characters_max: int
    plain_characters_max: int

    def encode(self, text: str) -> list[int]:
        """Token ids; special tokens written out in the text become their ids."""

    def encode_plain(self, text: str) -> list[int]:
        """Token ids of untrusted text: no part of it becomes a special token."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; special tokens are written out."""

    def token_bytes(self, token: int) -> bytes:
        """The bytes that one token stands for. These bytes may be only a part of a character."""

    def stream(self) -> TextStream:
        """A new decoder that returns text as tokens arrive."""


class TextStream(Protocol):
    """Turns tokens into text piece by piece. The decoder holds back the bytes of an unfinished character."""

    def push(self, ids: Sequence[int]) -> str: ...

    def finish(self) -> str: ...


class ByteTokenizer:
    """Id = byte value; special tokens from 256 on, as `antefix_tokenizer.json` lists them."""

    def __init__(self, special_tokens: dict[str, int], eos_tokens: Sequence[str] = ("<|eos|>", "<|end|>")) -> None:
        self.special_tokens = special_tokens
        self.special_ids = frozenset(special_tokens.values())
        self.num_tokens = max(special_tokens.values(), default=NUM_BYTES - 1) + 1
        self.plain_characters_max = 1
        self.token_characters_max = max(map(len, special_tokens), default=1)
        self._names = {number: name for name, number in special_tokens.items()}
        self.eos_ids = frozenset(special_tokens[name] for name in eos_tokens if name in special_tokens)
        names = sorted(special_tokens, key=len, reverse=True)
        self._split = re.compile("(" + "|".join(map(re.escape, names)) + ")") if names else None

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for piece in self._split.split(text) if self._split else [text]:
            if piece in self.special_tokens:
                ids.append(self.special_tokens[piece])
            else:
                ids.extend(piece.encode("utf-8", "surrogateescape"))
        return ids

    def encode_plain(self, text: str) -> list[int]:
        return list(text.encode("utf-8", "surrogateescape"))

    def decode(self, ids: Sequence[int]) -> str:
        stream = self.stream()
        return stream.push(ids) + stream.finish()

    def token_bytes(self, token: int) -> bytes:
        return bytes((token,)) if token < NUM_BYTES else self._names.get(token, "\ufffd").encode()

    def stream(self) -> TextStream:
        return _ByteStream(self._names)


class _ByteStream:
    def __init__(self, names: dict[int, str]) -> None:
        self._names = names
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, ids: Sequence[int]) -> str:
        text = ""
        for number in ids:
            if number < NUM_BYTES:
                text += self._decoder.decode(bytes((number,)))
            else:
                text += self._decoder.decode(b"", final=True) + self._names.get(number, "\ufffd")
                self._decoder.reset()
        return text

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


def _byte_of() -> dict[str, bytes]:
    """The byte that each character of a byte-level vocabulary stands for (GPT-2's encoder): printable bytes are written
    as themselves, the others as U+0100 and the characters after it, in order.
    """
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    table = {chr(byte): bytes((byte,)) for byte in shown}
    return table | {chr(0x100 + index): bytes((byte,)) for index, byte in enumerate(hidden)}


_BYTE_OF = _byte_of()


class HuggingFaceTokenizer:
    """A `tokenizer.json`, through the tokenizers library."""

    def __init__(self, path: Path, eos_ids: frozenset[int]) -> None:
        import tokenizers

        check_tokenizer_file(path)
        with library_errors(f"{path} cannot be used", ModelError):
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        self.eos_ids = eos_ids
        added_tokens = self._tokenizer.get_added_tokens_decoder()
        self.num_tokens = max(self._tokenizer.get_vocab().values(), default=-1) + 1
        self.special_ids = frozenset(number for number, token in added_tokens.items() if token.special)
        self._added_tokens = {number: token.content for number, token in added_tokens.items()}
        added = sorted(self._added_tokens.values(), key=len)
        self._added = re.compile("|".join(map(re.escape, reversed(added)))) if added else None
        spec = json.loads(self._tokenizer.to_str())
        self._is_byte_level = "ByteLevel" in json.dumps(spec["decoder"])
        self.token_characters_max = self.plain_characters_max = (
            max(map(len, self._tokenizer.get_vocab()), default=0) if _keeps_all(spec) else 0
        )

    def encode(self, text: str) -> list[int]:
        # `encode` would hold the interpreter's lock the whole time, so that no other thread could run.
        with library_errors("the model's tokenizer cannot read this text", InvalidRequest):
            return list(self._tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids)

    def encode_plain(self, text: str) -> list[int]:
        """Cut the text inside each occurrence of an added token, special or not, so that both halves are plain text."""
        ids: list[int] = []
        start = 0
        for match in self._added.finditer(text) if self._added else ():
            ids += self.encode(text[start : match.start() + 1])
            start = match.start() + 1
        return ids + self.encode(text[start:])

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False))

    def token_bytes(self, token: int) -> bytes:
        text = self._tokenizer.id_to_token(token)
        if text is None or token in self._added_tokens or not self._is_byte_level:
            return self.decode([token]).encode()
        return b"".join(_BYTE_OF.get(char, char.encode()) for char in text)

    def stream(self) -> TextStream:
        return _RedecodeStream(self)


# Pre-tokenizers that split text without dropping any of it.
_CUTTERS = {"Sequence", "Split", "ByteLevel", "Digits"}


def _keeps_all(spec: dict[str, Any]) -> bool:
    """Whether the tokenizer neither drops nor changes any character. If the tokenizer drops and changes nothing, no
    token stands for more characters than its own length.
    """

    def parts(part: Any) -> Iterator[dict[str, Any]]:
        if isinstance(part, dict):
            yield part
            for each in part.get("pretokenizers", ()):
                yield from parts(each)

    cutters = list(parts(spec.get("pre_tokenizer")))
    added = spec.get("added_tokens") or ()
    vocabulary = spec["model"].get("vocab") or {}
    return (
        (spec.get("normalizer") is None or spec["normalizer"] == {"type": "Sequence", "normalizers": []})
        and any(each.get("type") == "ByteLevel" for each in cutters)
        and all(each.get("type") in _CUTTERS and each.get("behavior") != "Removed" for each in cutters)
        and not any(token.get("lstrip") or token.get("rstrip") for token in added)
        and isinstance(vocabulary, dict)
        and all(character in vocabulary for character in _BYTE_OF)
    )


class _RedecodeStream:
    """Decodes the last few tokens together at each step, because a token's text can depend on the token before it."""

    def __init__(self, tokenizer: HuggingFaceTokenizer) -> None:
        self._tokenizer = tokenizer
        self._context: list[int] = []
        self._pending: list[int] = []

    def push(self, ids: Sequence[int]) -> str:
        self._pending.extend(ids)
        before = self._tokenizer.decode(self._context)
        after = self._tokenizer.decode(self._context + self._pending)
        if after.endswith("\ufffd"):
            return ""  # in the middle of a character
        self._context, self._pending = (self._context + self._pending)[-8:], []
        # The new text is what the pending tokens added. The shortened context is decoded again next time.
        return after[len(before) :]

    def finish(self) -> str:
        before = self._tokenizer.decode(self._context)
        return self._tokenizer.decode(self._context + self._pending)[len(before) :]


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a model directory.

    Raises:  ModelError: there is no tokenizer, or its file does not parse.
    """
    path = Path(path)
    byte_file = path / "antefix_tokenizer.json"
    try:
        if byte_file.is_file():
            return ByteTokenizer(special_tokens_of(byte_file))
        if (path / "tokenizer.json").is_file():
            return HuggingFaceTokenizer(path / "tokenizer.json", eos_ids_of(path))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as err:
        raise ModelError(f"the tokenizer in {path} cannot be read: {err}") from err
    raise ModelError(f"{path} has neither antefix_tokenizer.json nor tokenizer.json")
