"""With a wrong file in a model directory, one line names the file, and nothing is loaded."""

import json
import time

import pytest

from antefix.errors import InvalidRequest, ModelError
from antefix.layout import KVGeometry
from antefix.model.checkpoint import read_header
from antefix.model.model_config import ModelConfig
from antefix.model_dir import identify, read_config
from antefix.tokenizer import load_tokenizer
from antefix_router.chat.template import TemplateFormat, template_of
from tests.gateway.scripted import MODEL

CONFIG = json.loads((MODEL / "config.json").read_text())
JUNK = ["5", "{}", "[]", '"x"', "true", "-1", "1e18", "1" + "0" * 60, "1" + "0" * 5000, "NaN", "1e400", "0.5", "null"]
TOKENIZER = {
    "version": "1.0",
    "added_tokens": [],
    "normalizer": None,
    "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
    "model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []},
}


def read_all(path):
    config = read_config(path)
    identify(path, revision="x")
    ModelConfig.from_dict(config)
    KVGeometry.from_config(config)


@pytest.mark.parametrize("field", [*CONFIG, "rope_parameters", "layer_types", "compress_rates", "quantization_config"])
def test_any_value_of_any_field_of_a_config_is_taken_or_refused(tmp_path, field):
    for junk in JUNK:
        text = json.dumps({**CONFIG, field: "JUNK"}).replace('"JUNK"', junk)
        (tmp_path / "config.json").write_text(text)
        (tmp_path / "model.safetensors").write_bytes(b"")
        try:
            read_all(tmp_path)
        except InvalidRequest as err:
            assert len(str(err)) < 1000


@pytest.mark.parametrize("text", [b"[" * 100_000, b"{", b"[]", b"\xff", b'{"a": ' + b"9" * 5000 + b"}"], ids=range(5))
def test_configs_and_tokenizers_that_are_no_json_are_named(tmp_path, text):
    for name, read in (("config.json", read_config), ("tokenizer.json", load_tokenizer)):
        (tmp_path / name).write_bytes(text)
        with pytest.raises(ModelError, match=name):
            read(tmp_path)
        (tmp_path / name).unlink()


def changed(**fields):
    return json.dumps({**TOKENIZER, **fields})


def replace(content):
    return {"type": "Replace", "pattern": {"String": "a"}, "content": content}


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (changed(added_tokens=[{"id": 5, "content": "x"}] * 70_000), "65536"),
        (changed(added_tokens=7), "added_tokens"),
        (changed(normalizer={"type": "Sequence", "normalizers": [replace("aa")] * 40}), "times as long"),
        (changed(normalizer=replace("a" * 100_000)), "times as long"),
        (changed(model=5), "tokenizer.json"),
        (changed(pre_tokenizer={"type": "Split", "pattern": {"Regex": "("}}), "tokenizer.json"),
        ("{}", "tokenizer.json"),
    ],
)
def test_a_tokenizer_that_would_take_minutes_or_does_not_parse_is_refused_at_once(tmp_path, text, named):
    (tmp_path / "tokenizer.json").write_text(text)
    begin = time.process_time()
    with pytest.raises(ModelError, match=named):
        load_tokenizer(tmp_path)
    assert time.process_time() - begin < 5


def test_a_pattern_that_takes_too_long_is_an_error_and_no_panic(tmp_path):
    split = {"type": "Split", "pattern": {"Regex": "(a*)*(a*)*(a*)*b"}, "behavior": "Isolated", "invert": False}
    (tmp_path / "tokenizer.json").write_text(changed(pre_tokenizer=split))
    tokenizer = load_tokenizer(tmp_path)
    try:
        tokenizer.encode("a" * 5_000)
    except InvalidRequest as err:
        assert "cannot read this text" in str(err)


@pytest.mark.parametrize("eos", [[[1]], "x", 1.5, [True], {"a": 1}, -1, 10**30])
def test_invalid_end_tokens_are_refused(tmp_path, eos):
    (tmp_path / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": eos}))
    with pytest.raises(ModelError, match="eos_token_id"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("tokens", [{"": 256}, {"a": "x"}, {"a": 3}, {"a": 10**30}, [], {"a": None}])
def test_invalid_special_tokens_are_refused(tmp_path, tokens):
    (tmp_path / "antefix_tokenizer.json").write_text(json.dumps({"type": "byte", "special_tokens": tokens}))
    with pytest.raises(ModelError, match="antefix_tokenizer"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "entry",
    [
        '{"dtype":"F32","shape":[4,1e400],"data_offsets":[0,64]}',
        '{"dtype":"F32","shape":[-4,-4],"data_offsets":[0,64]}',
        '{"dtype":"F32","shape":7,"data_offsets":[0,64]}',
        '{"dtype":"F32","shape":[16],"data_offsets":["0",64]}',
        "[" * 50_000,
        '{"dtype":["F32"],"shape":[16],"data_offsets":[0,64]}',
        "null",
        '{"dtype":"F32"}',
    ],
    ids=range(8),
)
def test_headers_of_weights_that_make_no_sense_are_named(tmp_path, entry):
    header = f'{{"a":{entry}}}'.encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(64))
    with pytest.raises(ModelError, match=r"model\.safetensors|tensor a"):
        read_header(path)


@pytest.mark.parametrize("text", ["{% if", "{{ 1 | nothing }}", "{{ x.y.z }}", "{{ 'a' * 10**12 }}", "{{ 1 // 0 }}"])
@pytest.mark.parametrize("text2", ["", "{% for i in range(10**9) %}x{% endfor %}"])
def test_a_template_that_fails_is_an_error_of_ours(tmp_path, text, text2):
    from antefix_router.chat.messages import ChatRole, Conversation, Message

    messages = (Message(role=ChatRole.USER, content="u"),)
    with pytest.raises(InvalidRequest):
        TemplateFormat(text + text2, tmp_path).render(Conversation(messages=messages))


@pytest.mark.parametrize("content", ["[]", "{", '{"chat_template": 5}', "9" * 5000])
def test_a_tokenizer_config_that_makes_no_sense_is_refused_or_has_no_template(tmp_path, content):
    (tmp_path / "tokenizer_config.json").write_text(content)
    try:
        assert template_of(tmp_path) is None
    except ModelError as err:
        assert "tokenizer_config.json" in str(err)
