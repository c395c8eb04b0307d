"""The sockets of KV events: their allowed addresses and their CURVE keys.

KV events carry the token ids of prompts. So Antefix's sockets are on loopback, are Unix sockets, or are encrypted with
CURVE and open to listed clients only. vLLM and SGLang do not encrypt their events; the router reads them unencrypted if
its settings allow that.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import zmq
import zmq.asyncio
import zmq.utils.z85
from zmq.auth.asyncio import AsyncioAuthenticator

from antefix.errors import ConfigError
from antefix.private_file import create_private
from antefix.security.listening import is_loopback
from antefix.whole_number import whole_number

_KEY_CHARACTERS: Final = 40


class CurveKey:
    """One side's CURVE key pair, encoded in Z85. The secret half of the key pair never leaves the process."""

    def __init__(self, secret: bytes) -> None:
        """Raises:  ConfigError: not a key."""
        try:
            self.public = zmq.curve_public(secret)
        except (zmq.ZMQError, ValueError) as err:
            raise ConfigError(f"not a CURVE secret key: a key has {_KEY_CHARACTERS} characters of Z85") from err
        self.secret = secret

    @classmethod
    def from_file(cls, path: str | Path) -> CurveKey:
        """The key in the file. If the key file does not exist, it is created so that only its owner can read it."""
        path = Path(path)
        _, secret = zmq.curve_keypair()
        try:
            create_private(path, secret.decode() + "\n")
            return cls(path.read_bytes().strip())
        except OSError as err:
            raise ConfigError(f"CURVE key {path}: {err}") from err


def check_public_key(text: str) -> bytes:
    """Raises:  ConfigError: not a CURVE key."""
    try:
        if len(text) == _KEY_CHARACTERS and len(zmq.utils.z85.decode(text.encode())) == 32:
            return text.encode()
    except (ValueError, KeyError):
        pass  # not Z85; the error is raised below
    raise ConfigError(f"{text!r} is not a CURVE public key: a key has {_KEY_CHARACTERS} characters of Z85")


def is_local(endpoint: str) -> bool:
    """Whether messages to this address stay on the host."""
    scheme, _, rest = endpoint.partition("://")
    if scheme in ("ipc", "inproc"):
        return True
    return is_loopback(rest.rpartition(":")[0])


def check_endpoint(name: str, endpoint: str, *, is_encrypted: bool) -> None:
    """Raises:  ConfigError: it is not an address of ZeroMQ, or outsiders could read token ids there."""
    scheme, _, rest = endpoint.partition("://")
    port = rest.rpartition(":")[2]
    if scheme not in ("tcp", "ipc") or not rest or (scheme == "tcp" and whole_number(port, 65535) is None):
        raise ConfigError(f"{name} must be tcp://HOST:PORT or ipc://PATH, is {endpoint!r}")
    if not is_encrypted and not is_local(endpoint):
        raise ConfigError(
            f"{name} {endpoint} can be reached from other hosts, and KV events carry the token ids of prompts:"
            " use a loopback address or ipc://, or encrypt them with CURVE keys"
        )


class CurveDoor:
    """The server side of CURVE for one ZeroMQ context: admits only the listed clients. Needs a running event loop."""

    def __init__(self, context: zmq.asyncio.Context, key: CurveKey, clients: tuple[bytes, ...]) -> None:
        self._key = key
        self._clients = frozenset(clients)
        self._auth = AsyncioAuthenticator(context)

    def start(self) -> None:
        self._auth.start()
        self._auth.configure_curve_callback("*", credentials_provider=self)

    def guard(self, socket: Any) -> None:
        """Set up CURVE on a server's socket. CURVE must be set up before the socket is bound."""
        socket.curve_secretkey, socket.curve_publickey, socket.curve_server = self._key.secret, self._key.public, True
        socket.zap_domain = b"*"

    def callback(self, domain: str, key: bytes) -> bool:
        """Whether a client may connect. ZeroMQ's authenticator calls this method. key: the client's key, in Z85."""
        return key in self._clients

    def stop(self) -> None:
        self._auth.stop()


def guard_client(socket: Any, key: CurveKey, server: bytes) -> None:
    """Set up CURVE on a client's socket. CURVE must be set up before the socket connects."""
    socket.curve_secretkey, socket.curve_publickey, socket.curve_serverkey = key.secret, key.public, server
