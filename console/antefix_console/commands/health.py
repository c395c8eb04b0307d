"""`antefix health ADDRESS`: asks whether a role serves. Supervisors, containers and probes call this command and read
its exit code.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math

from grpc_health.v1 import health_pb2, health_pb2_grpc

from antefix import rpc
from antefix.errors import AntefixError, InvalidRequest
from antefix.security.identity import Role

_ROLES = ("kvstore", "prefill", "decode", "router")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("address", metavar="ADDRESS", help="address of the service, as host:port or unix:PATH")
    parser.add_argument(
        "--role",
        choices=_ROLES,
        help="role that the service at this address must have; with TLS, its certificate is checked for the role",
    )
    parser.add_argument(
        "--service",
        default="",
        metavar="NAME",
        help='gRPC service to ask about, such as antefix.v1.RouterService (default: "", alive)',
    )
    parser.add_argument(
        "--timeout-s", type=float, default=5.0, metavar="S", help="time limit of the whole call in seconds (default 5)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """The exit code is 0 if the service serves, and 1 if it reports that it does not, or does not answer."""
    if not (math.isfinite(args.timeout_s) and args.timeout_s > 0):
        raise InvalidRequest(f"--timeout-s must be above 0, is {args.timeout_s}")
    status = asyncio.run(_ask(args))
    if args.json:
        print(json.dumps({"address": args.address, "service": args.service, "status": status}))
    else:
        print(status)
    return 0 if status == "SERVING" else 1


async def _ask(args: argparse.Namespace) -> str:
    role = None if args.role is None else Role(args.role)
    request = health_pb2.HealthCheckRequest(service=args.service)
    try:
        async with rpc.channel(args.address, of=role) as channel:
            with rpc.rpc_errors():
                reply = await health_pb2_grpc.HealthStub(channel).Check(request, timeout=args.timeout_s)
    except InvalidRequest:
        raise
    except AntefixError as err:
        return f"nothing there says that it serves: {err}"
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(reply.status))
