"""Calls about window state to a prefill or decode worker: for operators."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import cast

from antefix import rpc
from antefix.v1 import window_pb2, window_pb2_grpc


@dataclass(slots=True)
class WindowClient:
    """Calls about window state to one prefill or decode worker: for operators."""

    address: str
    _stub: window_pb2_grpc.WindowServiceStub = field(init=False)

    def __post_init__(self) -> None:
        self._stub = window_pb2_grpc.WindowServiceStub(rpc.channel(self.address))

    async def status(self, *, num_plans_max: int = 0, timeout_s: float = 5.0) -> window_pb2.WindowStatusResponse:
        request = window_pb2.WindowStatusRequest(num_plans_max=num_plans_max)
        with rpc.rpc_errors():
            answer = await self._stub.WindowStatus(request, timeout=timeout_s)
        return cast(window_pb2.WindowStatusResponse, answer)

    async def set_strategy(self, strategy: str, *, timeout_s: float = 5.0) -> str:
        """Returns the strategy that was in force.  Raises:  InvalidRequest: not a strategy."""
        with rpc.rpc_errors():
            answer = await self._stub.SetStrategy(window_pb2.SetStrategyRequest(strategy=strategy), timeout=timeout_s)
        return str(answer.previous)
