"""Writes docs/API.md from docstrings and signatures of the names in `import antefix`: python docs/generate_api.py

Run it after you change a public name (`make docs-api`). A test fails if docs/API.md is out of date.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import antefix
import antefix_kvstore
from antefix_kvstore.embedded_store import EmbeddedStore

API_FILE = Path(__file__).parent / "API.md"
# Titles of the sections, by the module that defines the names.
_SECTIONS = {
    "antefix.clients": "Clients of the services",
    "antefix.blocking": "Blocking forms",
    "antefix.generation_request": "Requests to workers",
    "antefix.sampling": "Sampling",
    "antefix.wire": "",
    "antefix.usage": "What a request used",
    "antefix.restore_report": "What a restore did",
    "antefix.security.credentials": "What a caller shows",
    "antefix.store.open_store": "Stores",
    "antefix.store.api": "",
    "antefix.store.local_store": "",
    "antefix.store.remote_store": "",
    "antefix.miss_reason": "Why a block missed",
    "antefix.record": "What a store holds",
    "antefix.block": "Names of blocks",
    "antefix.layout": "Layouts of payloads",
    "antefix.errors": "Errors",
}
_HEAD = """# Python API

What `import antefix` gives, from the docstrings: `make docs-api` writes this file, and a test compares. Clients and
stores are asynchronous; each has a blocking form. All errors derive from `AntefixError`. Complete programs:
[examples/generate.py](../examples/generate.py), [examples/conversation.py](../examples/conversation.py),
[examples/store_blocks.py](../examples/store_blocks.py).

```python
from antefix import RouterClient, Sampling

async with RouterClient("127.0.0.1:7000") as router:
    async for message in router.generate("class Test(unittest.TestCase):", Sampling(max_tokens=64)):
        print(message.text, end="")
```
"""


def api_text() -> str:
    """The whole text of docs/API.md."""
    parts = [_HEAD]
    for module, title in _SECTIONS.items():
        if title:
            parts.append(f"## {title}\n")
        parts += [_entry(name, getattr(antefix, name)) for name in antefix._NAMES[module].split()]
        if module == "antefix.store.remote_store":
            parts.append("### A store in this process: `antefix_kvstore`\n")
            parts += [_entry("antefix_kvstore.open", antefix_kvstore.open), _entry("EmbeddedStore", EmbeddedStore)]
    return "\n".join(parts)


def _entry(name: str, value: Any) -> str:
    if not inspect.isclass(value):
        return f"### `{name}{_signature(value)}`\n\n{_doc(value)}" if inspect.isfunction(value) else f"### `{name}`\n"
    if issubclass(value, Exception):
        bases = ", ".join(base.__name__ for base in value.__bases__)
        return f"### `{name}({bases})`\n\n{_doc(value)}"
    lines = [f"### `{name}`\n\n{_doc(value)}"]
    if dataclasses.is_dataclass(value):
        lines.append("Fields: " + ", ".join(f"`{_field(field)}`" for field in dataclasses.fields(value)) + "\n")
    if issubclass(value, enum.Enum):
        lines.append("Values: " + ", ".join(f"`{member.name}`" for member in value) + "\n")
    elif (
        "__init__" in vars(value) and not dataclasses.is_dataclass(value) and not getattr(value, "_is_protocol", False)
    ):
        lines.append(f"- `{name}{_signature(value.__init__)}`")
    lines += _methods(value)
    return "\n".join(lines) + ("" if lines[-1].endswith("\n") else "\n")


def _methods(kind: type[Any]) -> Iterator[str]:
    """A line for each public method, also of our own base classes, and for each property that has a docstring."""
    seen: set[str] = set()
    for owner in kind.__mro__:
        if not owner.__module__.startswith("antefix"):
            continue
        for name, member in vars(owner).items():
            if name.startswith("_") or name in seen:
                continue
            seen.add(name)
            # A class that implements a protocol need not repeat the protocol's docstrings.
            promised = getattr(antefix.Store, name, None)
            doc = inspect.getdoc(member) or (inspect.getdoc(promised) if promised is not None else None) or ""
            doc = " ".join(doc.split())
            if inspect.isfunction(member):
                prefix = "async " if _waits(member) else ""
                yield f"- `{prefix}{name}{_signature(member)}`: {doc}"
            elif isinstance(member, classmethod):
                yield f"- `{kind.__name__}.{name}{_signature(member.__func__)}`: {doc}"
            elif isinstance(member, property | functools.cached_property) and doc:
                yield f"- `{name}`: {doc}"


def _waits(member: Any) -> bool:
    """Whether the caller must await it. A blocking client's methods are plain functions, which nobody awaits."""
    return bool(member.__code__.co_flags & (inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR))


class _Bare(str):
    """An annotation shown without quotes. The annotation is a string if the source has `from __future__ import
    annotations`.
    """

    def __repr__(self) -> str:
        return str(self)


def _signature(call: Any) -> str:
    """The signature as written in the source, without `self`."""
    signature = inspect.signature(call)
    parameters = [
        p.replace(annotation=_Bare(p.annotation))
        for p in signature.parameters.values()
        if p.name not in ("self", "cls")
    ]
    shown = str(signature.replace(parameters=parameters, return_annotation=_Bare(signature.return_annotation)))
    return shown.removesuffix(" -> None")


def _field(field: dataclasses.Field[Any]) -> str:
    shown = f"{field.name}: {field.type if isinstance(field.type, str) else field.type.__name__}"
    return shown if field.default is dataclasses.MISSING else f"{shown} = {field.default!r}"


def _doc(value: Any) -> str:
    text = inspect.getdoc(value) or ""
    # Each `Raises:` line and each field's line of a docstring becomes a separate paragraph.
    return re.sub(r"(?<!\n)\n(?=(\w+)(, \w+)*: )", "\n\n", text) + "\n"


if __name__ == "__main__":
    API_FILE.write_text(api_text())
    print(f"wrote {API_FILE}")
