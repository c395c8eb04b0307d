"""Parses addresses (host:port, [IPv6]:port or unix:PATH), and checks which ones may be used without TLS."""

from __future__ import annotations

import functools
import ipaddress
import socket
from typing import Final

from antefix.errors import ConfigError
from antefix.whole_number import whole_number

UNIX: Final = "unix:"
_WILDCARDS: Final = ("0.0.0.0", "::", "*")


# Workers renew their leases every few seconds, always with the same addresses.
@functools.lru_cache(1024)
def parse_address(address: str) -> tuple[str, int]:
    """Host and port of "host:port"; an IPv6 host keeps its brackets. unix:PATH is a host with port 0.

    Raises:  ConfigError: not of that form.
    """
    if address.startswith(UNIX):
        if len(address) == len(UNIX):
            raise ConfigError("unix: needs a path after it, such as unix:/run/antefix/router.sock")
        return address, 0
    host, _, port = address.rpartition(":")
    number = whole_number(port, 65535)
    if not host or number is None:
        raise ConfigError(f"address must be host:port, [IPv6]:port or unix:PATH, is {address!r:.200}")
    if ":" in host and not (host.startswith("[") and host.endswith("]")):
        raise ConfigError(f"address {address!r:.200}: put an IPv6 address into brackets, as in [::1]:7000")
    if host.startswith("["):
        try:
            ipaddress.IPv6Address(host[1:-1].partition("%")[0])
        except ValueError as err:
            raise ConfigError(f"address {address!r:.200}: {err!s:.200}") from err
    elif host.rpartition(".")[2].isdigit() or host.lower().startswith("0x"):
        # 127.1, 0177.0.0.1 and 2130706433: what they mean differs between resolvers.
        try:
            ipaddress.IPv4Address(host)
        except ValueError as err:
            raise ConfigError(f"address {address!r:.200}: {err!s:.200}") from err
    elif any(character.isspace() or character in "/@?#[]" for character in host):
        raise ConfigError(f"address must be host:port, [IPv6]:port or unix:PATH, is {address!r:.200}")
    elif not (host.isascii() and all(0 < len(label) < 64 for label in host.removesuffix(".").split("."))):
        try:
            # Python's own look-ups encode names in this way, and would raise this error, which is no OSError.
            host.encode("idna")
        except UnicodeError as err:
            raise ConfigError(f"address {address!r:.200}: {err!s:.200}") from err
    return host, number


def join_address(host: str, port: int) -> str:
    """The text form of a host address that `parse_address` returned."""
    return host if host.startswith(UNIX) else f"{host}:{port}"


def bare_host(host: str) -> str:
    """The host without an IPv6 address's brackets, as in certificates and sockets."""
    return host.strip("[]")


def names_host(san: str, host: str) -> bool:
    """Whether a certificate's name matches this host; `*.` matches one label."""
    if san.startswith("*."):
        return host.partition(".")[2] == san[2:]
    try:
        return ipaddress.ip_address(san) == ipaddress.ip_address(host)
    except ValueError:
        return san == host


def is_wildcard(host: str) -> bool:
    """Whether the host means all addresses of this machine, so that it cannot be used to call a service."""
    return bare_host(host) in _WILDCARDS


def is_loopback(host: str) -> bool:
    """Whether only this host can reach the address: a Unix socket, a loopback address, or a name that stands only for
    such addresses.
    """
    if host.startswith(UNIX) or host == "localhost":
        return True
    try:
        return ipaddress.ip_address(bare_host(host).partition("%")[0]).is_loopback
    except ValueError:
        pass  # a name, no number
    return _leads_here(host) is True


def _leads_here(host: str) -> bool | None:
    """Whether a host name resolves only to loopback addresses; None if the name does not resolve."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        return None
    return all(ipaddress.ip_address(str(row[4][0]).partition("%")[0]).is_loopback for row in found)


def check_listening(address: str, *, has_tls: bool, flag: str = "--address") -> None:
    """Raises:  ConfigError: without TLS, an address that other hosts may reach."""
    host, _ = parse_address(address)
    if not has_tls and not is_loopback(host):
        raise ConfigError(
            f"{flag} {address}: without TLS only loopback addresses (127.0.0.1, [::1]) and unix:PATH may be listened"
            " on; give --credentials DIR with tls.crt, tls.key and ca.crt (`antefix certs` makes them)"
        )


def check_calling(address: str, *, has_tls: bool) -> None:
    """Without TLS, allow calls only to this host: credentials and prompts must not cross a network unencrypted.

    Raises:  ConfigError: the address is on another host.
    """
    if has_tls:
        return
    host = bare_host(address.rpartition(":")[0])
    try:
        leads_here = ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        # A name that does not resolve is allowed, because the call will fail anyway.
        leads_here = address.startswith(UNIX) or host == "localhost" or _leads_here(host) is not False
    if not leads_here:
        raise ConfigError(
            f"{address} is on another host, which is called with TLS only: give --credentials DIR (`antefix certs`), or"
            " set ANTEFIX_CREDENTIALS for a command"
        )


def advertised(listening: str, advertise: str) -> str:
    """The address by which others reach a service. listening: the address where it listens. advertise: a host, or
    host:port; empty: the listening address is used.

    Raises:  ConfigError: the result is a wildcard address, which cannot be called.
    """
    host, port = parse_address(listening)
    if not advertise:
        if is_wildcard(host):
            raise ConfigError(
                f"other hosts cannot call the address {listening}: give --advertise HOST, the name by which they "
                "reach this host"
            )
        return listening
    has_port = advertise.startswith(UNIX) or advertise.rpartition("]")[2].count(":") == 1
    address = advertise if has_port and not advertise.endswith("]") else f"{advertise}:{port}"
    parse_address(address)
    return address
