"""Who may register as a worker: a process that has the deployment's secret, which is proved without sending it.

Applications call the router on the same port. One that registered an address of its own as a worker would be sent
other tenants' prompts.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Final

from antefix.errors import PermissionDenied, Unauthenticated
from antefix.secret import Keyring
from antefix.security.identity import DOMAIN, Identity
from antefix.security.listening import bare_host, names_host, parse_address

# Clocks of one deployment differ by less; an observed registration can be said again for so long, and says the same.
AGE_S_MAX: Final = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Registration:
    """A worker's statement. instance: each process makes a new one.  ttl_s: 0 takes it out.  said_at_ms: Unix time."""

    role: str
    address: str
    fingerprint: bytes
    instance: bytes
    ttl_s: float
    said_at_ms: int

    def proof(self, keyring: Keyring) -> bytes:
        """32 bytes that only the secret's owners can make for this very statement."""
        return keyring.proof(*self._parts())

    def check(self, keyring: Keyring, proof: bytes) -> None:
        """Raises:  Unauthenticated: made without the deployment's secret, or too long ago."""
        if not keyring.proves(proof, *self._parts()):
            raise Unauthenticated("only workers with the deployment's secret may register")
        if abs(time.time() - self.said_at_ms / 1000) > AGE_S_MAX:
            raise Unauthenticated(f"the registration is more than {AGE_S_MAX:g} s old, or the clocks differ by as much")

    def check_identity(self, identity: Identity) -> None:
        """A worker registers as what it is, and where it is.

        Raises:  PermissionDenied: its certificate is of another role, or for other hosts than the address's.
        """
        if not identity.proved:
            return
        if identity.role != self.role:
            raise PermissionDenied(f"{identity} may not register as a {self.role} worker")
        hosts = {host for host in identity.hosts if not host.endswith(f".{DOMAIN}")}
        host = bare_host(parse_address(self.address)[0]).lower()
        # A certificate of ours without hosts names its process, and routers check that name wherever they call it.
        if hosts and not any(names_host(name, host) for name in hosts):
            raise PermissionDenied(
                f"{identity} may not register at {host}: its certificate is for {', '.join(sorted(hosts))}"
            )

    def _parts(self) -> tuple[bytes, ...]:
        said = (self.role.encode(), self.address.encode(), self.fingerprint, self.instance)
        return (b"register", *said, repr(float(self.ttl_s)).encode(), str(self.said_at_ms).encode())
