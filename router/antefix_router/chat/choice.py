"""Chooses the format in which a model's conversations are written."""

from __future__ import annotations

from pathlib import Path

from antefix.errors import ConfigError
from antefix.model_dir import read_config
from antefix.tokenizer import ByteTokenizer, Tokenizer
from antefix_router.chat.chat_formats import ChatFormat
from antefix_router.chat.deepseek_v4 import EFFORTS_0731, DeepSeekV4Format
from antefix_router.chat.plain import PlainFormat
from antefix_router.chat.template import TemplateFormat, template_of


def choose_format(name: str, model: Path, tokenizer: Tokenizer, *, bounded: bool = False) -> ChatFormat:
    """The format that the setting names. "auto" takes the template in the model's directory, or else the V4 format, or
    else the plain one.

    Raises:  ConfigError: the template was asked for and the model directory has none.
    """
    template = template_of(model)
    if name == "auto":
        if template is not None:
            name = "template"
        elif isinstance(tokenizer, ByteTokenizer):
            name = "plain"
        else:
            name = _deepseek_v4(model) or "plain"
    if name == "template":
        if template is None:
            raise ConfigError(f"--chat-format template needs a chat template, and the model {model} has none")
        return TemplateFormat(template, model, bounded=bounded)
    if name == "deepseek-v4-0731":
        return DeepSeekV4Format(EFFORTS_0731)
    return DeepSeekV4Format() if name == "deepseek-v4" else PlainFormat()


def _deepseek_v4(model: Path) -> str:
    """The name of the chat format of a V4 checkpoint; empty if the model is no V4 checkpoint. Both V4 checkpoints have
    the same config. They are told apart by the encoder in the checkpoint's files or, without one, by the directory's
    name.
    """
    config = read_config(model)
    if config.get("model_type") != "deepseek_v4":
        return ""  # DeepSeek-V4.1 ("deepseek_v41") is another architecture with another format
    encoders = list((model / "encoding").glob("*.py"))
    is_later = "0731" in model.name
    if encoders:
        is_later = any("Beyond maximum" in path.read_text(errors="replace") for path in encoders)
    return "deepseek-v4-0731" if is_later else "deepseek-v4"
