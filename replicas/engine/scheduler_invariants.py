"""What holds of a scheduler between any two calls, for tests: counts, queues and blocks agree."""

from __future__ import annotations

from collections.abc import Collection

from cluster.base.errors import InternalError
from replicas.engine.request import EngineRequest
from replicas.engine.scheduler_config import SchedulerConfig
from replicas.engine.step_planner import StepPlanner


def check_planner(planner: StepPlanner, live: Collection[EngineRequest]) -> None:
    """Blocks and queues agree with the live requests.

    Raises:
        InternalError: what is wrong.
    """
    planner.kv.check_invariants()
    if len(planner.running) + len(planner.waiting) != len(live):
        raise InternalError("A live request neither runs nor waits, or does both.")
    if not live and planner.kv.num_free_blocks != planner.kv.num_blocks:
        raise InternalError("Blocks are held although no request is live.")
    if not len(planner.waiting) and planner.waiting.num_tokens:
        raise InternalError("Tokens wait although no request does.")


def check_request(
    request: EngineRequest, planner: StepPlanner, config: SchedulerConfig, num_in_flight: int
) -> None:
    """A request's counts agree with each other, with its blocks and with the steps in flight.

    Raises:
        InternalError: what is wrong.
    """
    kv, num_computed = planner.kv, request.num_computed_tokens
    if not (
        0
        <= request.num_answered_tokens
        <= num_computed
        <= request.num_tokens + max(request.num_pending_tokens, request.num_draft_tokens)
    ):
        raise InternalError(f"The counts of request {request.key} contradict each other.")
    if not 0 <= request.num_pending_tokens <= request.num_steps_in_flight:
        raise InternalError(f"Request {request.key} expects tokens of no step.")
    if request.num_steps_in_flight > num_in_flight:
        raise InternalError(f"Request {request.key} is in a step that is not in flight.")
    num_spare = config.speculation.num_tokens if config.speculation is not None else 0
    num_blocks = len(kv.block_table(request))
    if not (
        kv.num_blocks_for(num_computed)
        <= num_blocks
        <= kv.num_blocks_for(num_computed + (num_spare if num_computed else 0))
    ):
        raise InternalError(f"Request {request.key} holds too many or too few blocks.")
