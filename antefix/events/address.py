"""Checks the address of the Redis server or cluster that carries events, without importing a Redis client."""

from __future__ import annotations

from antefix.redis_access import check_redis_url


def check_url(url: str) -> None:
    """Raises:  ConfigError: the text is neither empty nor an allowed URL of Redis."""
    if url:
        check_redis_url(url, "events_redis")
