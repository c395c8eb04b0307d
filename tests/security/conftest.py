"""A CA that issues any certificate, and a real server with every service behind the guard."""

import contextlib
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from antefix import rpc
from antefix.secret import Keyring
from antefix.security.certificates import issue, make_ca
from antefix.security.credential_files import CredentialFiles
from antefix.security.credentials import Credentials
from antefix.security.grants import Granter
from antefix.security.identity import Role
from antefix.security.process_security import ProcessSecurity
from antefix.v1 import (
    decode_pb2,
    decode_pb2_grpc,
    fleet_pb2,
    fleet_pb2_grpc,
    kvstore_pb2,
    kvstore_pb2_grpc,
    memory_pb2,
    memory_pb2_grpc,
    prefill_pb2,
    prefill_pb2_grpc,
    router_pb2,
    router_pb2_grpc,
    usage_pb2,
    usage_pb2_grpc,
    window_pb2,
    window_pb2_grpc,
)

SERVICES = (
    (router_pb2, router_pb2_grpc.RouterServiceServicer, router_pb2_grpc.add_RouterServiceServicer_to_server),
    (usage_pb2, usage_pb2_grpc.UsageServiceServicer, usage_pb2_grpc.add_UsageServiceServicer_to_server),
    (fleet_pb2, fleet_pb2_grpc.FleetServiceServicer, fleet_pb2_grpc.add_FleetServiceServicer_to_server),
    (prefill_pb2, prefill_pb2_grpc.PrefillServiceServicer, prefill_pb2_grpc.add_PrefillServiceServicer_to_server),
    (decode_pb2, decode_pb2_grpc.DecodeServiceServicer, decode_pb2_grpc.add_DecodeServiceServicer_to_server),
    (window_pb2, window_pb2_grpc.WindowServiceServicer, window_pb2_grpc.add_WindowServiceServicer_to_server),
    (memory_pb2, memory_pb2_grpc.MemoryServiceServicer, memory_pb2_grpc.add_MemoryServiceServicer_to_server),
    (kvstore_pb2, kvstore_pb2_grpc.KvStoreServiceServicer, kvstore_pb2_grpc.add_KvStoreServiceServicer_to_server),
)
SECRET = b"the deployment's secret, 32 byte"


@dataclass
class Authority:
    """Issues certificates, and makes the security settings and credentials that use them."""

    directory: Path
    _made: dict = field(default_factory=dict)

    @property
    def ca(self):
        return self.directory / "ca"

    def files(self, role, name="x", *, hosts=("127.0.0.1", "localhost", "::1"), **more):
        role = Role(role)
        if (role, name) not in self._made:
            out = self.directory / f"{role}-{name}"
            issue(self.ca, out, role, name, hosts=hosts, **more)
            self._made[role, name] = out
        return CredentialFiles(self._made[role, name])

    def credentials(self, role, name="x", **more):
        return Credentials(Role(role), files=self.files(role, name, **more))

    def security(self, role, name="x", **more):
        return ProcessSecurity(Role(role), files=self.files(role, name), **more)

    def granter(self):
        return Granter.from_pem((self.ca / "grant.key").read_bytes())


@pytest.fixture(scope="session")
def authority(tmp_path_factory):
    directory = tmp_path_factory.mktemp("authority")
    make_ca(directory / "ca")
    return Authority(directory)


@pytest.fixture
def keyring():
    return Keyring(SECRET)


@pytest.fixture
async def serve():
    """`server = await serve(security)`: all services behind one guard. No service has methods of its own."""
    async with contextlib.AsyncExitStack() as stack:

        async def start(security, *, address="127.0.0.1:0", **options):
            def register(server):
                for _, servicer, add in SERVICES:
                    add(servicer(), server)

            server = await rpc.start_server(
                address, register, [module.DESCRIPTOR for module, *_ in SERVICES], security=security, **options
            )
            stack.push_async_callback(server.drain, 0)
            return server

        yield start
