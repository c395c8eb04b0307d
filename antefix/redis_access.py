"""How to reach a Redis server or cluster: by URL, over TLS, and with a password that does not appear in lists of
processes.

    rediss://user@host:6379/0    TLS; the certificate and its host name are checked, against `redis_ca_file` if given
    redis://127.0.0.1:6379/0     without TLS, so on this host only
    unix:///run/redis.sock       a socket of this host
    redis+cluster:// and rediss+cluster://   the same for a cluster

The Redis password is in its own file (`redis_password_file`), which is read at each connection. So a service need not
be restarted for a new password.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from antefix.config import require, setting
from antefix.errors import ConfigError
from antefix.private_file import read_private

if TYPE_CHECKING:
    from redis.asyncio import Redis, RedisCluster

_TLS: Final = ("rediss", "rediss+cluster")
_CLUSTER: Final = ("redis+cluster", "rediss+cluster")
SCHEMES: Final = ("redis", "rediss", "unix", "redis+cluster", "rediss+cluster")
# The only option that a URL may have: others, such as `ssl_cert_reqs=none`, would turn checks off.
_OPTIONS: Final = {"db"}
_PASSWORD: Final = "redis_password_file"


def redis_password_setting() -> Any:
    return setting(
        "", "file with Redis' password, readable by its owner only; the user name belongs in the URL", guards=True
    )


def redis_ca_setting() -> Any:
    return setting(
        "",
        "PEM file of the CA certificates that Redis' certificate is checked against; default: the system's CAs",
        guards=True,
    )


class RedisConfig(Protocol):
    """The settings of a role that concern Redis."""

    @property
    def redis_password_file(self) -> str: ...
    @property
    def redis_ca_file(self) -> str: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class RedisAccess:
    """How to reach one Redis server or cluster. The constructor checks the settings; `connect` connects.

    Raises:  ConfigError: as `check_redis_url`, or a file does not exist, or other users may read or change it.
    """

    url: str
    password_file: str = ""
    ca_file: str = ""

    def __post_init__(self) -> None:
        check_redis_url(self.url)
        if self.password_file:
            read_private(self.password_file, _PASSWORD)
        if self.ca_file:
            require(_parts(self.url).scheme in _TLS, f"redis_ca_file needs a rediss:// URL, is {self.url!r}")
            _read_ca(self.ca_file)

    @classmethod
    def of(cls, url: str, config: RedisConfig) -> RedisAccess:
        """The access that a role's settings describe."""
        return cls(url=url, password_file=config.redis_password_file, ca_file=config.redis_ca_file)

    def connect(self, *, timeout_s: float, connect_timeout_s: float | None = None) -> Redis | RedisCluster:
        """A Redis client, which connects when it is first used."""
        # Imported here because it takes half a second, which only users of Redis need to spend.
        from redis.asyncio import Redis, RedisCluster

        parts = _parts(self.url)
        options: dict[str, Any] = {
            "socket_timeout": timeout_s,
            "socket_connect_timeout": connect_timeout_s or timeout_s,
        }
        if parts.scheme in _TLS:
            options |= {"ssl_cert_reqs": "required", "ssl_check_hostname": True}
            if self.ca_file:
                options["ssl_ca_certs"] = self.ca_file
        if self.password_file:
            options["credential_provider"] = _Credentials(unquote(parts.username or ""), self.password_file)
            # The client refuses a user in the URL together with a credential provider.
            parts = parts._replace(netloc=parts.netloc.rpartition("@")[2])
        scheme = parts.scheme.removesuffix("+cluster")
        url = parts._replace(scheme=scheme).geturl()
        if parts.scheme == "unix":
            url = "unix://" + url.removeprefix("unix:").lstrip("/").join(("/", ""))
        if parts.scheme in _CLUSTER:
            return RedisCluster.from_url(url, **options)
        return Redis.from_url(url, **options)


def redis_failures() -> tuple[type[Exception], ...]:
    """The errors that are raised when Redis cannot be reached. The client is imported only here, because that takes a
    noticeable part of a service's start, also of one that uses no Redis.
    """
    from redis.exceptions import RedisClusterException, RedisError

    return (RedisError, RedisClusterException, OSError, TimeoutError)


class _Credentials:
    """User and password, read at each connection. Its repr shows neither."""

    def __init__(self, user: str, path: str) -> None:
        self._user, self._path = user, path

    def get_credentials(self) -> tuple[str] | tuple[str, str]:
        # Checked at every connection. If the file has become readable by others since the start, no connection is
        # made, and the log says why.
        password = read_private(self._path, _PASSWORD).strip()
        return (self._user, password) if self._user else (password,)

    async def get_credentials_async(self) -> tuple[str] | tuple[str, str]:
        return self.get_credentials()


def check_redis_url(url: str, name: str = "Redis") -> None:
    """Check the URL of a Redis server or cluster.  name: the setting, for the message.

    Raises:  ConfigError: it is not a URL of Redis; it holds a password, which every list of processes would show; it
        turns checks off; or it reaches another host without TLS.
    """
    try:
        parts = _parts(url)
        host, _ = parts.hostname or "", parts.port
    except ValueError:
        # The text is not quoted, because it may contain a password.
        raise ConfigError(
            f"{name} is not a URL; if the URL has a password, put the password into a file: {_PASSWORD}"
        ) from None
    if parts.password is not None:
        # The message must not contain the password either.
        raise ConfigError(f"{name}: the URL has a password, which others on this host could see: use {_PASSWORD}")
    schemes = ", ".join(f"{scheme}://" for scheme in SCHEMES)
    require(parts.scheme in SCHEMES, f"{name} must be a URL of Redis ({schemes}), is {url!r}")
    names = {option for option, _ in parse_qsl(parts.query, keep_blank_values=True)}
    require(
        names <= _OPTIONS,
        f"{name}: the only option that the URL may have is db, not {', '.join(sorted(names - _OPTIONS))}",
    )
    if parts.scheme == "unix":
        require(bool(parts.path), f"{name}: unix:// needs the path of a socket")
        return
    require(bool(host), f"{name} names no host: {url!r}")
    require(
        parts.scheme in _TLS or is_loopback(host),
        f"{name}: {url!r} would send data to another host unencrypted; use"
        f" {parts.scheme.replace('redis', 'rediss', 1)}://",
    )


def shown_redis_url(url: str) -> str:
    """The URL without user and password, for messages and logs."""
    parts = _parts(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _parts(url: str) -> SplitResult:
    return urlsplit(url)


def _read_ca(path: str) -> None:
    import ssl

    try:
        ssl.create_default_context(cafile=path)
    except (OSError, ssl.SSLError) as err:
        raise ConfigError(f"redis_ca_file {path}: {err}") from err
