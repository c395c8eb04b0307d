"""`antefix top`: the router's status page in a terminal. Keys sort and filter the tables; `--once` prints the page once
and ends.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import select
import ssl
import sys
import termios
import time
import tty
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from antefix.errors import InvalidRequest, PermissionDenied, Unauthenticated, Unavailable
from antefix.security.listening import is_loopback
from antefix.split_url import is_http_url, split_url
from antefix_console.commands.endpoint_flags import read_key
from antefix_console.operator_credentials import tls_for_url
from antefix_console.top.screen import Choice, screen

_ANSWER_BYTES_MAX = 64 << 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--url", default="http://127.0.0.1:8000", help="URL of the router's HTTP API (default http://127.0.0.1:8000)"
    )
    parser.add_argument("--key-file", type=Path, metavar="FILE", help="file with an API key that has the scope admin")
    parser.add_argument(
        "--every-s", type=float, default=2.0, metavar="N", help="seconds between two updates of the screen (default 2)"
    )
    parser.add_argument(
        "--once", action="store_true", help="print the screen once, and exit (the default without a terminal)"
    )
    parser.add_argument("--json", action="store_true", help="print the figures once as JSON, and exit")


def run(args: argparse.Namespace) -> int:
    """Raises:  Unavailable: no router answers.  PermissionDenied, Unauthenticated: the API key may not see the page."""
    if not 0.2 <= args.every_s <= 3600:
        raise InvalidRequest("--every-s must be from 0.2 to 3600")
    key = read_key(args.key_file) if args.key_file else ""
    args.url = _router_url(args.url)
    data = _read(args.url, key)
    if args.json:
        print(json.dumps(data, indent=1))
        return 0
    if args.once or not (sys.stdout.isatty() and sys.stdin.isatty()):
        _print_once(data)
        return 0
    _watch(args, key, data)
    return 0


def _print_once(data: dict[str, Any]) -> None:
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(screen(data, Choice(), height=200))


def _watch(args: argparse.Namespace, key: str, data: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.live import Live

    console, choice, problem = Console(), Choice(), ""
    with Live(console=console, screen=True, auto_refresh=False) as live, _single_keys():
        next_at = time.monotonic() + args.every_s
        while True:
            live.update(screen(data, choice, height=console.height, problem=problem), refresh=True)
            pressed = _pressed(max(0.0, next_at - time.monotonic()))
            if pressed in ("q", "\x1b", "\x03"):
                return
            choice = choice.after(pressed)
            if time.monotonic() >= next_at:
                next_at = time.monotonic() + args.every_s
                try:
                    data, problem = _read(args.url, key), ""
                except Unavailable as err:
                    problem = str(err)


@contextlib.contextmanager
def _single_keys() -> Iterator[None]:
    """Read pressed keys one by one, without waiting for Enter."""
    before = termios.tcgetattr(sys.stdin)
    tty.setcbreak(sys.stdin)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


def _pressed(within_s: float) -> str:
    ready, _, _ = select.select([sys.stdin], [], [], within_s)
    return sys.stdin.read(1) if ready else ""


def _opener(url: str, context: ssl.SSLContext | None) -> urllib.request.OpenerDirector:
    """Opens the URL without the environment's proxy for addresses of this host, which a proxy cannot reach."""
    handlers: list[urllib.request.BaseHandler] = [urllib.request.HTTPSHandler(context=context)]
    if is_loopback(split_url(url).hostname or ""):
        handlers.append(urllib.request.ProxyHandler({}))
    return urllib.request.build_opener(*handlers)


def _router_url(url: str) -> str:
    """The URL of the router's HTTP server. Also takes the address of its API, as `antefix up` prints it (with /v1), and
    that of the page (with /ui).
    """
    if not is_http_url(url):
        raise InvalidRequest(f"{url!r} is no URL of a router: such a URL begins with http:// or https://, then a host")
    return url.rstrip("/").removesuffix("/v1").removesuffix("/ui")


def _read(url: str, key: str) -> dict[str, Any]:
    headers = {"authorization": f"Bearer {key}"} if key else {}
    request = urllib.request.Request(f"{url}/ui/data?seconds=3600", headers=headers)
    context = tls_for_url(url, shows_key=bool(key))
    try:
        with _opener(url, context).open(request, timeout=10) as answer:
            data = json.loads(answer.read(_ANSWER_BYTES_MAX))
    except urllib.error.HTTPError as err:
        if err.code == 401:
            raise Unauthenticated(
                f"the router at {url} asks for an API key: name a file with the key in --key-file"
            ) from err
        if err.code == 403:
            raise PermissionDenied("this API key does not have the scope admin") from err
        raise Unavailable(
            f"the server at {url} answered with status {err.code}: is it a router of this version?"
        ) from err
    except (OSError, ValueError, RecursionError) as err:
        raise Unavailable(f"no router answers at {url}: {err}") from err
    if not isinstance(data, dict) or "workers" not in data:
        raise Unavailable(f"the server at {url} is not a router's HTTP API")
    return data
