"""Where events go through: the address of a Redis server or cluster. Apart, so that checking it needs no client."""

from __future__ import annotations

from antefix.redis_access import check_redis_url


def check_url(url: str) -> None:
    """Raises:  ConfigError: neither empty nor a URL of Redis that may be used."""
    if url:
        check_redis_url(url, "events_redis")
