"""Where events go through: the address of a Redis server or cluster. Apart, so that checking it needs no client."""

from __future__ import annotations

from antefix.errors import ConfigError


def check_url(url: str) -> None:
    """Raises:  ConfigError: neither empty nor a URL of Redis."""
    if url and not url.startswith(("redis://", "rediss://", "redis+cluster://")):
        raise ConfigError(f"events_redis must be a redis:// or redis+cluster:// URL, is {url!r}")
