"""Synthetic requests in the shapes that agents send, each with all levels of nesting that its API has."""

EPHEMERAL = {"type": "ephemeral", "ttl": "5m"}
SCHEMA = {"type": "object", "properties": {"path": {"type": "string"}}, "required": ["path"]}
PIXEL = "iVBORw0KGgo="

CHAT = {
    "model": "antefix-tiny",
    "messages": [
        {"role": "system", "content": [{"type": "text", "text": "Be brief.", "cache_control": dict(EPHEMERAL)}]},
        {"role": "user", "name": "ann", "content": [{"type": "text", "text": "Read a.txt"}]},
        {
            "role": "assistant",
            "content": "I look.",
            "reasoning_details": [{"type": "reasoning.text", "text": "Let me see."}],
            "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "read", "arguments": '{"path": "a.txt"}'}}
            ],
        },
        {
            "role": "tool",
            "tool_call_id": "c1",
            "content": [
                {"type": "text", "text": "hello"},
                {"type": "image_url", "image_url": {"url": "https://example.org/a.png", "detail": "low"}},
            ],
        },
        {"role": "user", "content": "And now?"},
    ],
    "tools": [
        {"type": "function", "function": {"name": "read", "description": "Reads.", "parameters": SCHEMA}},
    ],
    "thinking": {"type": "enabled"},
    "chat_template_kwargs": {"enable_thinking": True},
    "response_format": {"type": "text"},
    "stream_options": {"include_usage": True},
    "temperature": 1,
}
COMPLETIONS = {"model": "antefix-tiny", "prompt": "x", "stream_options": {"include_usage": True}, "max_tokens": 5}
RESPONSES = {
    "model": "antefix-tiny",
    "instructions": "Be brief.",
    "input": [
        {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "In a shell."}]},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Read a.txt"}]},
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "Let me see."}], "content": None},
        {"type": "function_call", "call_id": "c1", "name": "read", "arguments": '{"path": "a.txt"}'},
        {"type": "function_call_output", "call_id": "c1", "output": [{"type": "input_text", "text": "hello"}]},
        {"role": "user", "content": "And now?"},
    ],
    "tools": [{"type": "function", "name": "read", "parameters": SCHEMA, "strict": False}],
    "reasoning": {"effort": "high", "summary": "auto"},
    "include": ["reasoning.encrypted_content"],
    "text": {"format": {"type": "text"}, "verbosity": "low"},
    "stream_options": {},
    "store": False,
}
MESSAGES = {
    "model": "antefix-tiny",
    "max_tokens": 64,
    "system": [{"type": "text", "text": "Be brief.", "cache_control": {**EPHEMERAL, "scope": "global"}}],
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "Read a.txt"}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "Let me see.", "signature": "Zm9yZWlnbg=="},
                {"type": "text", "text": "I look."},
                {"type": "tool_use", "id": "c1", "name": "read", "input": {"path": "a.txt"}},
            ],
        },
        {
            "role": "user",
            "content": [
                {
                    "type": "tool_result",
                    "tool_use_id": "c1",
                    "content": [
                        {"type": "text", "text": "hello"},
                        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PIXEL}},
                    ],
                    "cache_control": dict(EPHEMERAL),
                }
            ],
        },
        {"role": "system", "content": "The time is short."},
        {"role": "user", "content": "And now?"},
    ],
    "tools": [{"name": "read", "description": "Reads.", "input_schema": SCHEMA, "eager_input_streaming": True}],
    "tool_choice": {"type": "auto"},
    "thinking": {"type": "adaptive"},
    "output_config": {"effort": "high"},
    "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
    "metadata": {"user_id": "u"},
}
BODIES = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": COMPLETIONS,
    "/v1/responses": RESPONSES,
    "/v1/messages": MESSAGES,
    "/v1/messages/count_tokens": MESSAGES,
}
# Objects that are content, not fields. The model reads whatever they hold.
CONTENT = ("parameters", "input_schema", "properties", "input")


def objects_of(value, path=()):
    """Paths of all objects of a body whose keys are fields."""
    if isinstance(value, dict):
        yield path
        for name, item in value.items():
            if name not in CONTENT or (name == "input" and isinstance(item, list)):
                yield from objects_of(item, (*path, name))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from objects_of(item, (*path, index))


def json_path(path, key):
    text = ""
    for name in (*path, key):
        text += f"[{name}]" if isinstance(name, int) else f".{name}" if text else name
    return text
