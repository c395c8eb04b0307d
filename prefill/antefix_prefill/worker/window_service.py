"""WindowService: lets operators see and change how a worker keeps window state. Protobuf stops here."""

from __future__ import annotations

import logging

import grpc

from antefix import rpc
from antefix.v1 import window_pb2, window_pb2_grpc
from antefix.window import Plan, in_force, parse
from antefix_prefill.worker.engine import Engine
from antefix_prefill.worker.plan_log import PlanOutcome

log = logging.getLogger("antefix.window")


class WindowServicer(window_pb2_grpc.WindowServiceServicer):
    """The gRPC calls of one worker."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def WindowStatus(
        self, request: window_pb2.WindowStatusRequest, context: rpc.Context
    ) -> window_pb2.WindowStatusResponse:
        engine = self._engine
        outcomes = list(engine.plans)
        newest = outcomes[max(len(outcomes) - request.num_plans_max, 0) :]
        return window_pb2.WindowStatusResponse(
            namespace=engine.namespace,
            strategy=str(engine.strategy),
            bounded_windows=engine.bounded_windows,
            align_tokens=engine.align_tokens,
            checkpoint_bytes=engine.budget.state.used_bytes,
            kinds=[
                window_pb2.PlanKindStatus(
                    kind=kind.value,
                    num_plans=record.num_plans,
                    num_outcomes=record.num_outcomes,
                    mean_error=record.mean_error,
                    stated_error=record.stated_error,
                    predicted_s=record.predicted_s,
                    actual_s=record.actual_s,
                )
                for kind, record in engine.planner.records.items()
            ],
            plans=[_record(engine, outcome) for outcome in newest],
        )

    async def SetStrategy(
        self, request: window_pb2.SetStrategyRequest, context: rpc.Context
    ) -> window_pb2.SetStrategyResponse:
        strategy = in_force(parse(request.strategy), has_pool=self._engine.window_pool is not None)
        previous, self._engine.strategy = self._engine.strategy, strategy
        log.info("the window strategy of namespace %s is now %s, was %s", self._engine.namespace, strategy, previous)
        return window_pb2.SetStrategyResponse(previous=str(previous))


def add_window_service(engine: Engine, server: grpc.aio.Server) -> None:
    window_pb2_grpc.add_WindowServiceServicer_to_server(WindowServicer(engine), server)


def _record(engine: Engine, outcome: PlanOutcome) -> window_pb2.PlanRecord:
    return window_pb2.PlanRecord(
        at_s=outcome.at_s,
        prompt_tokens=outcome.num_tokens,
        taken=_way(engine, outcome.plan),
        actual_s=outcome.actual_s,
        weighed=[_way(engine, plan) for plan in outcome.plans],
    )


def _way(engine: Engine, plan: Plan) -> window_pb2.PlannedWay:
    return window_pb2.PlannedWay(
        kind=plan.kind.value,
        resume_tokens=plan.resume_block * engine.block_size,
        replay_tokens=plan.replay_tokens,
        prefill_tokens=plan.prefill_tokens,
        load_bytes=plan.load_bytes,
        checkpoint_tier=plan.checkpoint_tier,
        predicted_s=plan.predicted_s,
        error_s=plan.error_s,
    )
