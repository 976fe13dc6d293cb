"""The bare engine in the caller's own thread: tests, benchmarks and offline batches.

Unlike the engine loop it has no inbox, no thread and no fault boundary of its own: an executor's
error is the caller's to handle.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from cluster.base.errors import error_from_dict
from replicas.api import (
    FinishReason,
    GenerationDelta,
    GenerationRequest,
    ReplicaStats,
    TokenLogprob,
)
from replicas.engine.executor import StepExecutor
from replicas.engine.step_ledger import StepTimes
from replicas.engine.step_runner import Clock, StepRunner
from replicas.engine.step_source import OutputT, PlanT, RequestBook, StepSource


@dataclass(slots=True, kw_only=True)
class Completion:
    """All deltas of one choice put together."""

    request_id: str
    index: int
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=list)
    embedding: tuple[float, ...] = ()
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    error: dict[str, str | None] | None = None
    num_cached_tokens: int = 0

    def extend(self, delta: GenerationDelta) -> None:
        """Append what one step added."""
        self.token_ids.extend(delta.token_ids)
        self.logprobs.extend(delta.logprobs)
        self.prompt_logprobs.extend(delta.prompt_logprobs)
        self.embedding = delta.embedding or self.embedding
        self.finish_reason = delta.finish_reason
        self.stop_token_id = delta.stop_token_id
        self.error = delta.error
        self.num_cached_tokens += delta.num_cached_tokens


class SyncEngine:
    """A step source and an executor, stepped by the caller.

    Args:
        step_timeout_s: longest wait for the answer to a step.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        scheduler: StepSource[PlanT, OutputT],
        executor: StepExecutor[PlanT, OutputT],
        *,
        step_timeout_s: float = 600.0,
        clock: Clock = time.monotonic,
    ) -> None:
        self._scheduler: RequestBook = scheduler
        self._clock = clock
        self._runner: StepRunner[Any, Any] = StepRunner(
            scheduler, executor, step_timeout_s=step_timeout_s, clock=clock
        )

    @property
    def has_unfinished(self) -> bool:
        """Whether any choice has not ended."""
        return self._scheduler.num_unfinished > 0

    @property
    def stats(self) -> ReplicaStats:
        """The load now."""
        return self._scheduler.stats()

    @property
    def times(self) -> StepTimes:
        """Where the time of all steps went."""
        return self._runner.ledger.times

    def add(self, request: GenerationRequest) -> None:
        """Queue a request.

        Raises:
            PenstockError: it is refused, see `Scheduler.add`.
        """
        self._scheduler.add(request, self._clock())

    def abort(self, request_id: str, index: int | None = None) -> list[GenerationDelta]:
        """End one choice, or all of a request, and return their last deltas."""
        return self._scheduler.abort(request_id, index)

    def step(self) -> list[GenerationDelta]:
        """Run one step; empty when nothing is left or nothing was said.

        Raises:
            InternalError: the executor failed, see `StepRunner.step`.
        """
        return self._runner.step() or []

    def run(self) -> Iterator[GenerationDelta]:
        """Deltas until every request has ended."""
        while self.has_unfinished:
            yield from self.step()

    def generate(self, requests: Sequence[GenerationRequest]) -> list[Completion]:
        """Run requests to their end, with whatever else is queued; choices in order.

        Raises:
            PenstockError: a request was refused, or failed.
        """
        for request in requests:
            self.add(request)
        completions = {
            (request.request_id, choice.index): Completion(
                request_id=request.request_id, index=choice.index
            )
            for request in requests
            for choice in request.choices
        }
        for delta in self.run():
            completion = completions.get((delta.request_id, delta.index))
            if completion is None:
                continue
            completion.extend(delta)
            if delta.error is not None:
                raise error_from_dict(delta.error)
        return list(completions.values())
