"""Checks the settings of `antefix up` that a role would refuse only after others have started: on a busy machine, the
workers take half a minute to load their model, and the router starts last.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from antefix.byte_size import parse_byte_size
from antefix.errors import ConfigError
from antefix.model_dir import read_config
from antefix.objects.bucket import scheme_of
from antefix.redis_access import check_redis_url
from antefix.security.listening import UNIX, bare_host, is_loopback, parse_address
from antefix_console.deployment import DeploymentConfig

# With this variable the routers that `antefix up` starts speak TLS.
_ROUTER_TLS: Final = "ANTEFIX_ROUTER_CREDENTIALS"


def check_before_start(config: DeploymentConfig) -> None:
    """Check the model's directory, the store's size, the object store's URL, the named files and what is in them, the
    places of the bill, and the ports.

    Raises:  ConfigError: one of them cannot be used; the message names the flag.  ModelError: there is no model.
    """
    read_config(config.model)
    if config.object_store:
        scheme_of(config.object_store)
    if config.store_bytes:
        with _named("--store-bytes"):
            parse_byte_size(config.store_bytes)
    for flag, name in (
        ("--tenants-file", config.tenants_file),
        ("--api-keys-file", config.api_keys_file),
        ("--model-aliases", config.model_aliases),
        ("--prefix-rules", "" if config.prefix_rules == "off" else config.prefix_rules),
        *(("--ratecards", name) for name in config.ratecards),
    ):
        if name and not Path(name).exists():
            raise ConfigError(f"{flag} {name}: there is no such file")
    _check_bill(config)
    _check_names(config)
    for flag, address in (("--address", config.router_address), ("--http-address", config.http_address)):
        if address:
            _check_port(flag, address)


def _check_bill(config: DeploymentConfig) -> None:
    """Read the files of tenants, keys and prices, and check where the bill is shared and anchored."""
    # Imported only where they are needed, because each costs a start some tenths of a second.
    if config.tenants_file:
        from antefix_billing.tenants import load_tenants

        with _named("--tenants-file"):
            load_tenants(config.tenants_file, has_other_keys=bool(config.api_keys_file))
    if config.api_keys_file:
        from antefix_billing.key_file import read_book

        with _named("--api-keys-file"):
            read_book(config.api_keys_file)
    if config.ratecards:
        from antefix_billing.ratecard import load_cards

        with _named("--ratecards"):
            load_cards(config.ratecards)
    if config.anchors:
        from antefix_billing.anchor import check_place

        for place in config.anchors:
            with _named("--anchors"):
                check_place(place)
    if config.bill_redis:
        check_redis_url(config.bill_redis, "--bill-redis")


def _check_names(config: DeploymentConfig) -> None:
    """Read the files of models' names and of rules for prompts."""
    if config.model_aliases:
        from antefix_router.gateway.model_names import load_aliases

        with _named("--model-aliases"):
            load_aliases(config.model_aliases)
    if config.prefix_rules:
        from antefix_router.chat.moved_lines import load_rules

        with _named("--prefix-rules"):
            load_rules(config.prefix_rules)


@contextlib.contextmanager
def _named(flag: str) -> Iterator[None]:
    """Errors of the block name this flag."""
    try:
        yield
    except ConfigError as err:
        raise ConfigError(f"{flag}: {err}") from err


def _check_port(flag: str, address: str) -> None:
    """Raises:  ConfigError: other hosts could reach it without TLS; the port is in use, or not for this user."""
    host, port = parse_address(address)
    if not is_loopback(host) and not os.environ.get(_ROUTER_TLS):
        raise ConfigError(
            f"{flag} {address}: other hosts can reach this address, and `antefix up` speaks no TLS, so give 127.0.0.1,"
            " [::1] or unix:PATH; for other hosts start the roles with `antefix serve` and --credentials"
            " (docs/SECURITY.md), or a proxy that speaks TLS"
        )
    if host.startswith(UNIX) or not port:
        return
    # A host name that does not resolve is the router's to refuse.
    with contextlib.suppress(socket.gaierror):
        family, kind, _, _, where = socket.getaddrinfo(bare_host(host), port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            # As servers do: connections of an earlier run that are still closing do not hold the port.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(where)
            except OSError as err:
                why = os.strerror(err.errno) if err.errno else str(err)
                raise ConfigError(
                    f"{flag} {address} cannot be listened on: {why}; 127.0.0.1:0 takes any free port"
                ) from err
