"""Tokenizers: decoding inverts encoding exactly, and streams have no broken characters."""

import json
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from antefix.errors import ModelError
from antefix.tokenizer import ByteTokenizer, load_tokenizer

SPECIAL = {"<|bos|>": 256, "<|eos|>": 257, "<|user|>": 258, "<|end|>": 259}
TOKENIZER = ByteTokenizer(SPECIAL)


@given(text=st.text())
def test_decoding_gives_the_text_back(text):
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


@given(text=st.text(), sizes=st.lists(st.integers(1, 5), max_size=40))
def test_streaming_in_pieces_gives_the_same_text(text, sizes):
    ids = TOKENIZER.encode(text)
    stream, out = TOKENIZER.stream(), ""
    for size in sizes:
        out += stream.push(ids[:size])
        ids = ids[size:]
    assert out + stream.push(ids) + stream.finish() == text


def test_a_character_is_never_shown_in_halves():
    stream = TOKENIZER.stream()
    assert [stream.push([byte]) for byte in "é".encode()] == ["", "é"]


@given(text=st.text())
def test_the_bytes_of_all_tokens_are_the_texts_bytes(text):
    assert b"".join(TOKENIZER.token_bytes(number) for number in TOKENIZER.encode(text)) == text.encode()


def test_special_tokens_have_ids_of_their_own():
    assert TOKENIZER.encode("<|user|>a<|end|>") == [258, 97, 259]
    assert TOKENIZER.eos_ids == {257, 259}


@pytest.fixture
def hugging_face(tmp_path):
    """A byte-level BPE tokenizer from a directory."""
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    made.train_from_iterator(["the prefix of a prompt, the prefix of a cache"] * 4, trainer)
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2]}))
    return load_tokenizer(tmp_path)


def test_a_hugging_face_tokenizer_streams_what_it_decodes(hugging_face):
    tokenizer = hugging_face
    text = "the cache naïve 漢字 prefix"
    ids = tokenizer.encode(text)
    stream = tokenizer.stream()
    assert "".join(stream.push([number]) for number in ids) + stream.finish() == text == tokenizer.decode(ids)
    assert tokenizer.eos_ids == {1, 2}
    assert b"".join(tokenizer.token_bytes(number) for number in ids) == text.encode()


def test_other_threads_go_on_while_a_hugging_face_tokenizer_encodes(hugging_face):
    text = "the prefix of a prompt, 12 caches; " * 20_000
    ended, num_turns = [], 0
    encoding = threading.Thread(target=lambda: ended.append(len(hugging_face.encode(text))))
    encoding.start()
    while not ended:
        time.sleep(0.001)
        num_turns += 1
    encoding.join()
    # If encoding held the interpreter's lock, the loop would run only before and after it.
    assert num_turns > 5


@pytest.mark.parametrize("content", [None, "{", '{"type": "word"}', '{"type": "byte"}'])
def test_a_missing_or_broken_tokenizer_is_a_model_error(tmp_path, content):
    if content is not None:
        (tmp_path / "antefix_tokenizer.json").write_text(content)
    with pytest.raises(ModelError):
        load_tokenizer(tmp_path)
