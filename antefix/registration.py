"""Registration of workers: only a process with the deployment's secret may register. A process proves that it has the
secret without sending the secret.

Applications call the router on the same port as workers. An application that could register its own address as a worker
would receive other tenants' prompts.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Final

from antefix.errors import PermissionDenied, Unauthenticated
from antefix.secret import Keyring
from antefix.security.identity import DOMAIN, Identity
from antefix.security.listening import bare_host, names_host, parse_address

# The clocks of a deployment differ by less than this. An eavesdropper can replay a registration for this long, but
# cannot change it.
AGE_S_MAX: Final = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Registration:
    """A worker's registration.

    instance: random bytes, new for each process. ttl_s: how long the registration is valid; 0 removes the worker.
    said_at_ms: when the registration was made, in Unix time.
    """

    role: str
    address: str
    fingerprint: bytes
    instance: bytes
    ttl_s: float
    said_at_ms: int

    def proof(self, keyring: Keyring) -> bytes:
        """32 bytes that only a process with the secret can compute for this registration."""
        return keyring.proof(*self._parts())

    def check(self, keyring: Keyring, proof: bytes) -> None:
        """Raises:  Unauthenticated: the proof was made without the deployment's secret, or the
        registration is too old.
        """
        if not keyring.proves(proof, *self._parts()):
            raise Unauthenticated("only workers with the deployment's secret may register")
        if abs(time.time() - self.said_at_ms / 1000) > AGE_S_MAX:
            raise Unauthenticated(
                f"the registration was made more than {AGE_S_MAX:g} s ago, or the clocks of the two hosts "
                "differ by more than that"
            )

    def check_identity(self, identity: Identity) -> None:
        """Check that role and address match the worker's certificate.

        Raises:  PermissionDenied: the certificate is for another role, or not for the address's host.
        """
        if not identity.proved:
            return
        if identity.role != self.role:
            raise PermissionDenied(f"{identity} may not register as a {self.role} worker")
        hosts = {host for host in identity.hosts if not host.endswith(f".{DOMAIN}")}
        host = bare_host(parse_address(self.address)[0]).lower()
        # A certificate of the deployment without hosts names its process. Routers check that name when they call the
        # worker, whatever its address is.
        if hosts and not any(names_host(name, host) for name in hosts):
            raise PermissionDenied(
                f"{identity} may not register at {host}: its certificate is for {', '.join(sorted(hosts))}"
            )

    def _parts(self) -> tuple[bytes, ...]:
        said = (self.role.encode(), self.address.encode(), self.fingerprint, self.instance)
        return (b"register", *said, repr(float(self.ttl_s)).encode(), str(self.said_at_ms).encode())
