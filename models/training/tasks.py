"""Training and test sequences that need long range: facts planted in text, asked for later, and repeated passages.

Everything is made of bytes and the special tokens of `antefix_tokenizer.json`. Each token of a sequence has a weight
class: 0 (unpredictable: a planted value, random noise), 1 (text), 2 (an answer, which only memory can give).
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from models.training.corpus import BOS, Tokens

EOS, USER, ASSISTANT, END, PAD = 257, 258, 259, 260, 261
NOISE, TEXT, ANSWER = 0, 1, 2


def words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_ADJECTIVES = words(
    "amber azure bitter bold brave brisk calm clever cobalt copper crimson curious dapper dusty eager early "
    "fabled fierce frosty gentle gilded golden grand green hidden hollow humble icy idle ivory jolly keen "
    "lazy little lively lonely lunar mellow mighty misty noble odd olive patient plain proud quiet rapid "
    "royal rusty sacred shy silent silver sleepy solar steady sunny swift tidy velvet vivid wild witty young zesty"
)
_NOUNS = words(
    "anchor badger beacon bison bridge canyon castle cedar cobra comet condor coral cricket delta dingo dragon "
    "eagle ember falcon ferry fjord forest fox garden gecko geyser glacier harbor hawk heron island jaguar jungle "
    "kestrel lagoon lantern lemur lion lotus lynx maple marsh meadow meteor monsoon moose nebula orchid osprey otter "
    "panda parrot pebble pelican pine planet prairie puffin quartz rabbit raven reef river robin rocket saddle salmon"
)
_CITIES = words(
    "Athens Bergen Bogota Cairo Dakar Delhi Dublin Geneva Hanoi Havana Krakow Kyoto Lagos Lima Lisbon Lyon "
    "Madrid Malmo Manila Milan Nairobi Oslo Ottawa Porto Prague Quito Riga Rome Seoul Tokyo Tunis Vienna"
)
_LETTERS = "abcdefghijklmnopqrstuvwxyz"
# What is asked: the wording of the fact's subject, and the kind of value.
_ATTRIBUTES = (
    ("access code", "number"),
    ("serial number", "number"),
    ("password", "word"),
    ("home town", "city"),
)
# Only in training, so that wording varies; tests use the lists above and the first wording.
_MORE_ATTRIBUTES = (
    ("phone number", "number"),
    ("room", "number"),
    ("order id", "number"),
    ("port", "number"),
    ("nickname", "word"),
    ("secret word", "word"),
    ("next stop", "city"),
    ("birthplace", "city"),
)
_NAMES = words(
    "Alice Anton Bella Bruno Carla Cedric Dana Dmitri Elena Emil Fatima Felix Greta Hugo Ines Ivan Julia Karim Laura "
    "Lucas Maria Milo Nadia Nils Olga Oscar Paula Pedro Rosa Samir Sofia Tomas Ursula Victor Wanda Xavier Yusuf Zoe"
)
_WORDINGS = (
    ("The {attribute} of {key} is ", "What is the {attribute} of {key}?"),
    ("{key} has the {attribute} ", "Which {attribute} does {key} have?"),
    ("Remember that the {attribute} of {key} is ", "Tell me the {attribute} of {key}."),
    ("{key}: {attribute} ", "{attribute} of {key}?"),
)
# Every eighth pair of words never appears in training, so that a test's keys are new.
_HELD_OUT_SHARE = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Fact:
    """One planted statement, e.g. the access code (attribute) of amber-falcon (key) is 48213 (value)."""

    attribute: str
    key: str
    value: str
    wording: int = 0

    @property
    def planted(self) -> str:
        """The statement in the text, up to its value."""
        return _WORDINGS[self.wording][0].format(attribute=self.attribute, key=self.key)

    @property
    def question(self) -> str:
        return _WORDINGS[self.wording][1].format(attribute=self.attribute, key=self.key)

    @property
    def subject(self) -> str:
        """The answer up to its value: the same for every wording."""
        return _WORDINGS[0][0].format(attribute=self.attribute, key=self.key)


@dataclass(slots=True)
class Sequence:
    """Tokens and weight classes under construction."""

    tokens: list[NDArray[np.uint16]]
    weights: list[NDArray[np.uint8]]
    length: int

    def add(self, text: str | Tokens, weight: int) -> None:
        tokens = encode(text) if isinstance(text, str) else text
        self.tokens.append(tokens)
        self.weights.append(np.full(len(tokens), weight, dtype=np.uint8))
        self.length += len(tokens)

    def add_special(self, token: int, weight: int = TEXT) -> None:
        self.add(np.array([token], dtype=np.uint16), weight)

    def cut(self, length: int) -> tuple[Tokens, NDArray[np.uint8]]:
        """Exactly `length` tokens; a short sequence is padded, and padding weighs nothing."""
        tokens = np.full(length, PAD, dtype=np.uint16)
        weights = np.zeros(length, dtype=np.uint8)
        size = min(length, self.length)
        tokens[:size] = np.concatenate(self.tokens)[:size]
        weights[:size] = np.concatenate(self.weights)[:size]
        return tokens, weights


def empty_sequence() -> Sequence:
    return Sequence(tokens=[], weights=[], length=0)


def encode(text: str) -> Tokens:
    return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.uint16)


def held_out(key: str) -> bool:
    """Whether a key is kept for tests only."""
    return zlib.crc32(key.encode()) % _HELD_OUT_SHARE == 0


def random_key(rng: np.random.Generator, *, test: bool) -> str:
    while True:
        key = f"{_ADJECTIVES[rng.integers(len(_ADJECTIVES))]}-{_NOUNS[rng.integers(len(_NOUNS))]}"
        if held_out(key) == test:
            return key


def random_value(rng: np.random.Generator, kind: str) -> str:
    if kind == "number":
        return str(rng.integers(10_000, 100_000))
    if kind == "word":
        return "".join(_LETTERS[i] for i in rng.integers(26, size=6))
    return _CITIES[rng.integers(len(_CITIES))]


def random_facts(rng: np.random.Generator, count: int, *, test: bool = False) -> list[Fact]:
    """`count` facts about different keys. For tests: unseen keys, one wording; else a third varies."""
    facts: dict[str, Fact] = {}
    while len(facts) < count:
        plain = test or rng.random() < 0.67
        attributes = _ATTRIBUTES if plain else _ATTRIBUTES + _MORE_ATTRIBUTES
        attribute, kind = attributes[rng.integers(len(attributes))]
        named = not plain and rng.random() < 0.4
        key = _NAMES[rng.integers(len(_NAMES))] if named else random_key(rng, test=test)
        wording = 0 if plain else int(rng.integers(len(_WORDINGS)))
        facts.setdefault(key, Fact(attribute=attribute, key=key, value=random_value(rng, kind), wording=wording))
    return list(facts.values())


def random_slice(rng: np.random.Generator, corpus: Tokens, length: int) -> Tokens:
    start = int(rng.integers(max(len(corpus) - length, 1)))
    return corpus[start : start + length]


def text_sequence(rng: np.random.Generator, corpus: Tokens, length: int) -> Sequence:
    """Plain text, from a random place."""
    sequence = empty_sequence()
    sequence.add(random_slice(rng, corpus, length), TEXT)
    return sequence


def fact_sequence(rng: np.random.Generator, corpus: Tokens, length: int) -> Sequence:
    """A conversation: long pasted text with facts in it, and a question after a log-uniform distance."""
    count = int(np.clip(length // rng.integers(120, 400), 2, 96))
    events: list[tuple[int, int, Fact]] = []
    for fact in random_facts(rng, count):
        planted = int(rng.integers(0, max(length - 300, 1)))
        events.append((planted, 0, fact))
        for _ in range(int(rng.integers(1, 3))):
            events.append((planted + _log_uniform(rng, 60, length - planted), 1, fact))
    sequence = empty_sequence()
    sequence.add_special(BOS)
    sequence.add_special(USER)
    for position, asks, fact in sorted(events, key=lambda event: event[:2]):
        if position > sequence.length:
            sequence.add(random_slice(rng, corpus, position - sequence.length), TEXT)
        (add_question if asks else add_fact)(sequence, fact)
        if sequence.length >= length:
            break
    sequence.add(random_slice(rng, corpus, max(length - sequence.length, 0)), TEXT)
    return sequence


def _log_uniform(rng: np.random.Generator, low: int, high: int) -> int:
    return int(np.exp(rng.uniform(np.log(low), np.log(max(high, low + 1)))))


def add_fact(sequence: Sequence, fact: Fact) -> None:
    """Plant a fact on a line of its own. The fact's key and value are unpredictable, so they weigh nothing."""
    sequence.add("\n", TEXT)
    sequence.add(fact.planted + fact.value, NOISE)
    sequence.add(".\n", TEXT)


def add_question(sequence: Sequence, fact: Fact) -> None:
    """Ask a question, and answer it in a full sentence, of which only the value counts as an answer."""
    sequence.add("\n\n" + fact.question, NOISE)
    sequence.add_special(END)
    sequence.add_special(ASSISTANT)
    sequence.add(fact.subject, TEXT)
    sequence.add(fact.value, ANSWER)
    sequence.add(".", TEXT)
    sequence.add_special(END)
    sequence.add_special(USER)


def recall_sequence(rng: np.random.Generator, corpus: Tokens, length: int) -> Sequence:
    """Facts back to back, each stated again later in shuffled order: the densest lesson in looking up."""
    sequence = empty_sequence()
    sequence.add_special(BOS)
    while sequence.length < length:
        facts = random_facts(rng, int(rng.integers(2, 40)))
        code = rng.random() < 0.5
        for again in (False, True):
            for index in rng.permutation(len(facts)):
                _add_statement(sequence, facts[index], code=code, again=again)
        sequence.add(random_slice(rng, corpus, int(rng.integers(1, 200))), TEXT)
    return sequence


def _add_statement(sequence: Sequence, fact: Fact, *, code: bool, again: bool) -> None:
    subject = f"{fact.key.replace('-', '_')} = " if code else fact.subject
    sequence.add(subject, NOISE)
    sequence.add(fact.value, ANSWER if again else NOISE)
    sequence.add("\n" if code else ".\n", TEXT)


def repeat_sequence(rng: np.random.Generator, corpus: Tokens, length: int) -> Sequence:
    """Text in which passages come back word for word. In the repeated passage, all bytes but the first ones count as an
    answer.
    """
    sequence = empty_sequence()
    passages: list[Tokens] = []
    while sequence.length < length:
        sequence.add(random_slice(rng, corpus, _log_uniform(rng, 8, 600)), TEXT)
        if passages and rng.random() < 0.5:
            passage = passages[int(rng.integers(len(passages)))]
            head = min(8, len(passage) // 2)
            sequence.add(passage[:head], NOISE)
            sequence.add(passage[head:], ANSWER)
        else:
            passages.append(_random_passage(rng, corpus))
            sequence.add(passages[-1], NOISE)
    return sequence


def _random_passage(rng: np.random.Generator, corpus: Tokens) -> Tokens:
    if rng.random() < 0.5:
        return random_slice(rng, corpus, int(rng.integers(24, 200)))
    words = (random_value(rng, "word")[: int(rng.integers(2, 7))] for _ in range(int(rng.integers(4, 24))))
    return encode(" ".join(words))


MAKERS = {"text": text_sequence, "facts": fact_sequence, "recall": recall_sequence, "repeat": repeat_sequence}


def make_sequence(
    rng: np.random.Generator, corpus: Tokens, length: int, mixture: dict[str, float]
) -> tuple[Tokens, NDArray[np.uint8]]:
    """One training sequence of exactly `length` tokens, its task drawn from `mixture` (shares that sum to 1)."""
    task = str(rng.choice(list(mixture), p=list(mixture.values())))
    return MAKERS[task](rng, corpus, length).cut(length)


def retrieval_sequence(
    rng: np.random.Generator, corpus: Tokens, length: int, distances: list[int]
) -> tuple[Tokens, list[tuple[int, int]]]:
    """A test: for each distance a fact with an unseen key, asked for that many tokens later, all in one text.

    Returns the tokens and, for each distance, where its answer's value starts and ends. Twice as many facts are planted
    as are asked for. Raises ValueError if a distance does not fit into the text.
    """
    if max(distances) > length - 400:
        raise ValueError(f"a distance of {max(distances)} tokens does not fit into a text of {length} tokens")
    facts = random_facts(rng, 2 * len(distances), test=True)
    events: list[tuple[int, int]] = []
    for index, distance in enumerate(distances):
        asked = int(rng.integers(distance + 10, length - 300))
        events += [(asked - distance, index), (asked, index)]
    events += [(int(rng.integers(length - 300)), index) for index in range(len(distances), len(facts))]
    sequence = empty_sequence()
    sequence.add_special(BOS)
    sequence.add_special(USER)
    spans: dict[int, tuple[int, int]] = {}
    planted: set[int] = set()
    for position, index in sorted(events):
        sequence.add(random_slice(rng, corpus, max(position - sequence.length, 0)), TEXT)
        if index not in planted:
            add_fact(sequence, facts[index])
            planted.add(index)
            continue
        add_question(sequence, facts[index])
        # After the value come ".", <|end|> and <|user|>.
        end = sequence.length - 3
        spans[index] = (end - len(facts[index].value), end)
    if sequence.length > length:
        return retrieval_sequence(rng, corpus, length, distances)
    tokens, _ = sequence.cut(length)
    return tokens, [spans[index] for index in range(len(distances))]
