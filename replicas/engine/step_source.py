"""What the engine loop asks of whoever plans its steps: one scheduler, or one per group of ranks.

The loop knows no more of a plan than its number and how much work it is.
"""

from __future__ import annotations

from typing import Protocol, TypeVar

from cluster.base.errors import PenstockError
from replicas.api import GenerationDelta, GenerationRequest, ReplicaStats
from replicas.engine.weight_traffic import WeightTraffic


class PlannedStep(Protocol):
    """A plan as far as its driver cares."""

    @property
    def step(self) -> int:
        """Its number; grows by one with each plan."""
        ...

    @property
    def num_tokens(self) -> int:
        """Query tokens of the whole step."""
        ...

    @property
    def heaviest(self) -> tuple[int, int]:
        """Query tokens and requests of the busiest ranks, which decide how long the step takes."""
        ...


class AnsweredStep(Protocol):
    """An answer as far as its driver cares."""

    @property
    def duration_s(self) -> float:
        """The workers' own time for the step."""
        ...

    @property
    def sign_s(self) -> float:
        """From the sign that the step was nearly done to its end; 0 when none can be counted on."""
        ...

    @property
    def idle_s(self) -> float:
        """How long the workers stood idle before the step."""
        ...

    @property
    def traffic(self) -> WeightTraffic | None:
        """What the workers' weights have moved since their start; None: they stay."""
        ...


PlanT = TypeVar("PlanT", bound=PlannedStep)
OutputT = TypeVar("OutputT", bound=AnsweredStep)
OutputT_contra = TypeVar("OutputT_contra", contravariant=True)


class RequestBook(Protocol):
    """Live requests: in, out, and how many; see `Scheduler` for what each call promises."""

    @property
    def num_unfinished(self) -> int:
        """Choices that have not ended."""
        ...

    @property
    def oldest_waiting_arrival_s(self) -> float | None:
        """Arrival of the choice that has waited longest for its first step."""
        ...

    def add(self, request: GenerationRequest, arrival_s: float = 0.0) -> None:
        """Queue a request, or raise why not."""
        ...

    def abort(self, request_id: str, index: int | None = None) -> list[GenerationDelta]:
        """End one choice, or all of a request."""
        ...

    def fail_all(self, error: PenstockError) -> list[GenerationDelta]:
        """End every choice with the same error."""
        ...

    def restart(self, *, keeps_cache: bool = False) -> None:
        """The workers have forgotten their rows, and unless they keep it their cache too."""
        ...

    def stats(self) -> ReplicaStats:
        """The load now."""
        ...


class StepSource(RequestBook, Protocol[PlanT, OutputT_contra]):
    """Plans steps and takes in their answers, in the order of the plans."""

    def schedule(self) -> PlanT | None:
        """Plan the next step; None when there is nothing to plan now."""
        ...

    def update_from_output(self, plan: PlanT, output: OutputT_contra) -> list[GenerationDelta]:
        """Take in the answer to the oldest plan in flight."""
        ...
