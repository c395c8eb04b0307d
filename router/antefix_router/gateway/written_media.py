"""Pictures and documents that are written out in a tool's result as JSON. Pure.

Some clients have no place for a picture in a tool's result and send the JSON of it as text. To a model of text that is
noise, a hundred thousand tokens of it, in every turn from there on. So a short placeholder stands for the data, and the
rest of the JSON stays as it was.
"""

from __future__ import annotations

import re
from typing import Final

# How the base64 of each format begins: PNG, JPEG, GIF, RIFF (WebP, WAV), PDF, Ogg, MP3 with a tag.
_BEGINNINGS: Final = {
    "iVBORw0KGgo": "image",
    "/9j/": "image",
    "R0lGOD": "image",
    "UklGR": "image",
    "JVBERi0": "document",
    "T2dnUw": "audio",
    "SUQz": "audio",
}
_KINDS: Final = {"image": "image", "audio": "audio", "video": "video", "application": "document"}
# A whole string of JSON, and no shorter one: a text that speaks of a picture's first bytes stays. JSON within JSON has
# its quotes escaped, and some writers escape slashes. Bounds keep the search linear, whatever a tool wrote.
_MEDIA: Final = re.compile(
    r'(?P<quote>\\{0,7}")(?:data:(?P<type>image|audio|video|application)/[\w.+-]+(?:;[\w=.+-]+)*;base64,|'
    r"(?=(?P<begins>" + "|".join(map(re.escape, _BEGINNINGS)) + r"))"
    r")(?:[A-Za-z0-9+/_-]|\\{1,3}/){40,}=*(?P=quote)"
)


def placeholder(what: str) -> str:
    return f"[{what}: not shown, this model reads text only]"


def without_media(text: str) -> tuple[str, list[str]]:
    """The text with placeholders, and what they stand for. Only JSON is looked into: in other text, data may be what a
    tool was asked for."""
    if not text.lstrip().startswith(("{", "[")):
        return text, []
    kinds: list[str] = []

    def replaced(found: re.Match[str]) -> str:
        kinds.append(_KINDS[found["type"]] if found["type"] else _BEGINNINGS[found["begins"]])
        return f"{found['quote']}{placeholder(kinds[-1])}{found['quote']}"

    return _MEDIA.sub(replaced, text), kinds
