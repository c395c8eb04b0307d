"""Calls about window state to a prefill or decode worker: for operators."""

from __future__ import annotations

import grpc

from antefix import rpc
from antefix.clients.service_client import ServiceClient
from antefix.clients.statuses import WindowStatus, window_status_from_wire
from antefix.request_limits import answered
from antefix.v1 import window_pb2, window_pb2_grpc


class WindowClient(ServiceClient[window_pb2_grpc.WindowServiceStub]):
    """Calls about window state to one prefill or decode worker: for operators."""

    def _make_stub(self, channel: grpc.aio.Channel) -> window_pb2_grpc.WindowServiceStub:
        return window_pb2_grpc.WindowServiceStub(channel)

    async def status(self, *, num_plans_max: int = 0, timeout_s: float = 5.0) -> WindowStatus:
        """The window strategy in force, and how accurately restores were predicted. num_plans_max: how many of the
        newest plans to return; 0 for none.
        """
        request = window_pb2.WindowStatusRequest(num_plans_max=num_plans_max)
        with rpc.rpc_errors():
            answer = answered(await self._stub.WindowStatus(request, timeout=timeout_s))
        return window_status_from_wire(answer)

    async def set_strategy(self, strategy: str, *, timeout_s: float = 5.0) -> str:
        """Use another window strategy from the next request on. Returns the window strategy that was in force before.

        Raises:  InvalidRequest: not a strategy.
        """
        with rpc.rpc_errors():
            answer = answered(
                await self._stub.SetStrategy(window_pb2.SetStrategyRequest(strategy=strategy), timeout=timeout_s)
            )
        return str(answer.previous)
