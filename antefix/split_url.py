"""Splits URLs that people wrote into their parts. Python's own function raises ValueError for some texts, and reads the
port only when it is asked for.
"""

from __future__ import annotations

from urllib.parse import SplitResult, urlsplit

from antefix.errors import ConfigError


def split_url(url: str, name: str = "") -> SplitResult:
    """The parts of a URL, whose `port` can be read without an error.

    name: of the setting, for the message. A URL that may hold a password is never quoted: see redis_access.py.
    Raises:  ConfigError: a bracket is open, or the port is no number from 0 to 65535.
    """
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError as err:
        raise ConfigError(f"{name}{': ' if name else ''}{url!r:.200} is not a URL: {err}") from err
    return parts


def is_http_url(url: str) -> bool:
    """Whether this is an http:// or https:// URL with a host."""
    try:
        parts = split_url(url)
    except ConfigError:
        return False
    return parts.scheme in ("http", "https") and bool(parts.hostname)
