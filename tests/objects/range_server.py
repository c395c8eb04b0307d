"""An HTTP server of a directory's files by ranges, in one thread per connection, that can misbehave."""

from __future__ import annotations

import re
import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.waiting import AT_MOST_S


@dataclass
class Manners:
    """harm: what happens to each answer's body or head; empty: nothing.  once: only to the next answer.  hanging: set
    when an answer hangs.
    """

    directory: Path
    harm: str = ""
    once: bool = False
    num_requests: int = 0
    num_connections: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)
    hanging: threading.Event = field(default_factory=threading.Event)
    released: threading.Event = field(default_factory=threading.Event)


def _handler(manners: Manners) -> type[socketserver.StreamRequestHandler]:
    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            with manners.lock:
                manners.num_connections += 1
            while line := self.rfile.readline():
                head = b"".join(iter(self.rfile.readline, b"\r\n")).decode()
                with manners.lock:
                    manners.num_requests += 1
                first, last = (int(each) for each in re.search(r"bytes=(\d+)-(\d+)", head).groups())
                if not self._answer(line.split()[1].decode().partition("?")[0], first, last + 1):
                    return

        def _answer(self, path: str, start: int, stop: int) -> bool:
            """Whether the connection stays open."""
            file = manners.directory / path.lstrip("/")
            with manners.lock:
                harm, manners.harm = manners.harm, "" if manners.once else manners.harm
            if harm in ("silence", "slow"):
                manners.hanging.set()
                manners.released.wait(2 * AT_MOST_S)
                if harm == "silence":
                    return False
            if harm == "503" or not file.exists():
                status = "503 Slow Down" if harm == "503" else "404 Not Found"
                self.wfile.write(f"HTTP/1.1 {status}\r\nContent-Length: 0\r\n\r\n".encode())
                return True
            data = file.read_bytes()
            body = bytearray(data if harm == "no ranges" else data[start:stop])
            status = "200 OK" if harm == "no ranges" else "206 Partial Content"
            closes = "Connection: close\r\n" if harm == "close" else ""
            self.wfile.write(f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n{closes}\r\n".encode())
            if harm == "flip":
                body[len(body) // 2] ^= 1
            whole = harm not in ("truncate", "hang")
            self.wfile.write(body if whole else body[: len(body) // 2])
            self.wfile.flush()
            if harm == "hang":
                manners.hanging.set()
                manners.released.wait(2 * AT_MOST_S)
            return whole and harm not in ("close", "close silently")

    return Handler


@contextmanager
def range_server(manners: Manners) -> Iterator[str]:
    """The server's URL."""

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True

    with Server(("127.0.0.1", 0), _handler(manners)) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            manners.released.set()
            server.shutdown()
            thread.join()
