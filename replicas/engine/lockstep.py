"""The contract of a lock-step: what the leader of an expert-parallel replica sends for one step.

Every data-parallel group has a plan of its own and its own KV blocks; what the groups share is the
header. All ranks of the replica run every step together: a group without work gets an empty plan
and takes part in each layer's exchange with zero rows, because a rank that stays away hangs the
others. The header says all that ranks must agree on, so no collective is spent on agreeing.

Plain values of ints, floats, strings and tuples, so that any codec can carry them.
"""

from __future__ import annotations

from dataclasses import dataclass

from moe.expert_table import ExpertTable
from replicas.engine.scheduler_output import SchedulerOutput, StepOutput


@dataclass(frozen=True, slots=True, kw_only=True)
class Rebalance:
    """Experts that are about to move: what ranks prepare while steps go on."""

    version: int
    tables: tuple[ExpertTable, ...]
    """Of the layers that change."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertOrders:
    """What a step says of the places of experts.

    A rebalance is announced in one step; ranks fetch weights in the background and say when they
    are done. Once all are, a later step carries its version as `table`: every rank switches before
    that step, so no two ranks ever disagree about where an expert is.
    """

    table: int = 0
    """Version of the placement that this step uses; 0: the one all ranks began with."""
    rebalance: Rebalance | None = None
    """To be prepared from now on."""
    abort: bool = False
    """What is being prepared will not be used: forget it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepHeader:
    """What all ranks of the replica know of a step."""

    step: int
    num_tokens: tuple[int, ...]
    """Query tokens of each data-parallel group; 0: the group idles."""
    scheme: str
    """The exchange that every layer of the step uses."""
    reason: str = ""
    """Why this scheme, for the log."""
    experts: ExpertOrders = ExpertOrders()

    def is_idle(self, group: int) -> bool:
        """Whether the ranks of a group take part with zero rows."""
        return self.num_tokens[group] == 0


@dataclass(frozen=True, slots=True, kw_only=True)
class RankStep:
    """What one rank is sent: the header and its group's plan (empty when the group idles)."""

    header: StepHeader
    plan: SchedulerOutput


@dataclass(frozen=True, slots=True, kw_only=True)
class LockstepPlan:
    """One step of all groups; `plans[g].step` is the header's for every group."""

    header: StepHeader
    plans: tuple[SchedulerOutput, ...]
    groups: tuple[int, ...]
    """Groups that have ranks, ascending: who is sent the step and answers it."""

    @property
    def step(self) -> int:
        """Number of the step."""
        return self.header.step

    @property
    def num_tokens(self) -> int:
        """Query tokens of all groups."""
        return sum(self.header.num_tokens)

    @property
    def heaviest(self) -> tuple[int, int]:
        """Query tokens and requests of the busiest group: the others wait for it."""
        return max(plan.heaviest for plan in self.plans)

    def for_group(self, group: int) -> RankStep:
        """What the ranks of a group are sent."""
        return RankStep(header=self.header, plan=self.plans[group])


@dataclass(frozen=True, slots=True, kw_only=True)
class LockstepOutput:
    """The answers of the output ranks to one step, parallel to the plan's `groups`."""

    outputs: tuple[StepOutput, ...]

    @property
    def step(self) -> int:
        """Number of the step; all outputs have the same."""
        return self.outputs[0].step

    @property
    def duration_s(self) -> float:
        """The slowest group's time."""
        return max(output.duration_s for output in self.outputs)

    @property
    def idle_s(self) -> float:
        """Nothing is learnt from it: groups that stand by wait for those that compute."""
        return 0.0

    @property
    def traffic(self) -> None:
        """Ranks that share experts hold all of their weights."""
        return None

    @property
    def sign_s(self) -> float:
        """No sign is counted on: one group's says nothing of the others."""
        return 0.0
