"""Replaces pictures and documents that are written as JSON text in a tool's result. Pure.

Some clients have no place for a picture in a tool's result and send its JSON as text. A text model cannot use the data
of a picture, which takes a hundred thousand tokens in every later turn. So a short placeholder replaces the picture's
data, and the rest of the JSON stays.
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
# Matches a whole JSON string of at least this length, so that a text which quotes a picture's first bytes stays. JSON
# within JSON has escaped quotes, and some writers escape slashes. Bounds keep the search linear for any input.
_MEDIA: Final = re.compile(
    r'(?P<quote>\\{0,7}")(?:data:(?P<type>image|audio|video|application)/[\w.+-]+(?:;[\w=.+-]+)*;base64,|'
    r"(?=(?P<begins>" + "|".join(map(re.escape, _BEGINNINGS)) + r"))"
    r")(?:[A-Za-z0-9+/_-]|\\{1,3}/){40,}=*(?P=quote)"
)


def placeholder(what: str) -> str:
    return f"[{what}: not shown, this model reads text only]"


def without_media(text: str) -> tuple[str, list[str]]:
    """The text with placeholders, and a description of each placeholder. Only JSON is searched for pictures: in other
    text, the data may be the very text that the tool was asked for.
    """
    if not text.lstrip().startswith(("{", "[")):
        return text, []
    kinds: list[str] = []

    def replaced(found: re.Match[str]) -> str:
        kinds.append(_KINDS[found["type"]] if found["type"] else _BEGINNINGS[found["begins"]])
        return f"{found['quote']}{placeholder(kinds[-1])}{found['quote']}"

    return _MEDIA.sub(replaced, text), kinds
