"""Checks the settings of `antefix up` that a role would refuse only after others have started: on a busy machine, the
workers take half a minute to load their model, and the router starts last.
"""

from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path

from antefix.byte_size import parse_byte_size
from antefix.errors import ConfigError
from antefix.model_dir import read_config
from antefix.objects.bucket import scheme_of
from antefix.security.listening import UNIX, bare_host, parse_address
from antefix_console.deployment import DeploymentConfig


def check_before_start(config: DeploymentConfig) -> None:
    """Check the model's directory, the store's size, the object store's URL, the named files and the ports.

    Raises:  ConfigError: one of them cannot be used; the message names the flag.  ModelError: there is no model.
    """
    read_config(config.model)
    if config.object_store:
        scheme_of(config.object_store)
    if config.store_bytes:
        try:
            parse_byte_size(config.store_bytes)
        except ConfigError as err:
            raise ConfigError(f"--store-bytes: {err}") from err
    for flag, name in (
        ("--tenants-file", config.tenants_file),
        ("--api-keys-file", config.api_keys_file),
        ("--model-aliases", config.model_aliases),
        ("--prefix-rules", "" if config.prefix_rules == "off" else config.prefix_rules),
        *(("--ratecards", name) for name in config.ratecards),
    ):
        if name and not Path(name).exists():
            raise ConfigError(f"{flag} {name}: there is no such file")
    for flag, address in (("--address", config.router_address), ("--http-address", config.http_address)):
        if address:
            _check_port(flag, address)


def _check_port(flag: str, address: str) -> None:
    """Raises:  ConfigError: the port is in use, or may not be used by this user."""
    host, port = parse_address(address)
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
