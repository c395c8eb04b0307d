"""The flags that name an endpoint, for commands that send requests to one."""

from __future__ import annotations

import argparse
from pathlib import Path

from antefix.errors import InvalidRequest
from antefix_console.endpoint.client import EndpointConfig
from antefix_console.endpoint.dialects import DIALECTS


def add_endpoint_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--url", required=True, help="URL of the endpoint, including its version, such as http://127.0.0.1:8000/v1"
    )
    parser.add_argument(
        "--api", choices=sorted(DIALECTS), default="chat", help="API that is used to call the endpoint (default: chat)"
    )
    parser.add_argument(
        "--model", default="", help="model name at the endpoint (default: the first that the endpoint lists)"
    )
    parser.add_argument(
        "--key-file",
        type=Path,
        metavar="FILE",
        help="file with the API key, because other users could see a key on the command line",
    )
    parser.add_argument(
        "--timeout-s",
        type=float,
        default=300.0,
        help="longest time in seconds that the endpoint may send nothing (default 300)",
    )


def endpoint_of(args: argparse.Namespace, key_file: Path | None = None) -> EndpointConfig:
    """key_file: replaces --key-file.

    Raises:  InvalidRequest: a flag or a key file is invalid.
    """
    path = key_file or args.key_file
    return EndpointConfig(
        url=args.url, api=args.api, model=args.model, key=read_key(path) if path else "", timeout_s=args.timeout_s
    )


def read_key(path: Path) -> str:
    """Raises:  InvalidRequest: the file holds no key.  OSError: it cannot be read."""
    key = path.read_text(encoding="utf-8").strip()
    if not key or not key.isprintable() or len(key.split()) != 1:
        raise InvalidRequest(f"{path} holds no API key: one line without spaces is expected")
    return key
