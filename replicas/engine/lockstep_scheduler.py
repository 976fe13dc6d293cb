"""One scheduler per data-parallel group behind the interface of one; steps them in lock-step.

Owns which group a request belongs to (decided on arrival, because its KV lives there; a group that
loses its ranks hands its requests over) and the step header. Each group's scheduler keeps its own
queues and blocks and does not know of the others. A step is planned when any group has work; one
without it gets an empty plan. When none has, nothing is planned, and all ranks sleep until the next
plan reaches them. Pure, like the schedulers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from cluster.base.errors import ConfigError, InternalError, PenstockError
from replicas.api import GenerationDelta, GenerationRequest, ReplicaStats
from replicas.engine.arrival import check_arrival
from replicas.engine.group_choice import GroupView, choose_group
from replicas.engine.lockstep import ExpertOrders, LockstepOutput, LockstepPlan, StepHeader
from replicas.engine.prefix_cache import HashChain
from replicas.engine.request import EngineRequest, KeyCounter
from replicas.engine.scheduler import Scheduler
from replicas.engine.scheduler_config import SchedulerConfig
from replicas.engine.scheduler_output import SchedulerOutput

ChooseScheme = Callable[[int], tuple[str, str]]
"""From the query tokens of the busiest group to the exchange of the step, and why."""


class LockstepScheduler:
    """All live requests of one expert-parallel replica. Not thread-safe.

    Args:
        config: limits of each group, but for `max_waiting_requests`, which all share.
        num_groups: data-parallel groups.
        eos_token_ids: the model's end-of-sequence tokens.
        choose_scheme: the exchange for a step; called once per plan.
        expert_orders: where experts are or go; called once per plan, in the order of the plans.
        serving: the groups that have ranks, ascending, at least one; None: all of them. It may
            change at a restart, or by groups without requests while no step is in flight.

    Raises:
        ConfigError: there is no group.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        num_groups: int,
        *,
        choose_scheme: ChooseScheme,
        eos_token_ids: Iterable[int] = (),
        expert_orders: Callable[[], ExpertOrders] = ExpertOrders,
        serving: Callable[[], Sequence[int]] | None = None,
    ) -> None:
        if num_groups < 1:
            raise ConfigError(f"{num_groups} data-parallel groups cannot run anything.", param="dp")
        eos = tuple(eos_token_ids)
        self.config = config
        keys = KeyCounter()
        self.groups = tuple(Scheduler(config, eos, keys) for _ in range(num_groups))
        self._choose_scheme = choose_scheme
        self._expert_orders = expert_orders
        self._serving = serving or (lambda: range(num_groups))
        self._step = 0

    @property
    def num_unfinished(self) -> int:
        """Choices that have not ended."""
        return sum(group.num_unfinished for group in self.groups)

    @property
    def oldest_waiting_arrival_s(self) -> float | None:
        """Arrival of the choice that has waited longest for its first step."""
        arrivals = [group.oldest_waiting_arrival_s for group in self.groups]
        return min((arrival for arrival in arrivals if arrival is not None), default=None)

    @property
    def num_discarded_tokens(self) -> int:
        """Tokens sampled for choices that had ended by then."""
        return sum(group.num_discarded_tokens for group in self.groups)

    def add(self, request: GenerationRequest, arrival_s: float = 0.0) -> None:
        """Queue a request in the group that suits it; see `Scheduler.add`.

        Raises:
            PenstockError: it is refused.
        """
        stats = [group.stats() for group in self.groups]
        check_arrival(
            request,
            self.config,
            is_known=any(group.knows(request.request_id) for group in self.groups),
            num_waiting=sum(group.num_waiting for group in stats),
        )
        chain = HashChain(self.config.block_size, request.cache_salt)
        serving = self._serving()
        views = [
            GroupView(
                stats=stats[index],
                num_cached_tokens=self.groups[index].num_cached_tokens(request, chain),
            )
            for index in serving
        ]
        chosen = choose_group(request.num_known_tokens, self.config.block_size, views)
        self.groups[serving[chosen]].add(request, arrival_s)

    def abort(self, request_id: str, index: int | None = None) -> list[GenerationDelta]:
        """End one choice, or all of a request, at once; none for an unknown id."""
        return [delta for group in self.groups for delta in group.abort(request_id, index)]

    def fail_all(self, error: PenstockError) -> list[GenerationDelta]:
        """End every choice of every group: the replica is lost, and this is why."""
        return [delta for group in self.groups for delta in group.fail_all(error)]

    def schedule(self) -> LockstepPlan | None:
        """Plan the next step of all groups; it has to be executed.

        Returns:
            None when no group has something to compute now, or one waits for its answers: a step
            without it would make it miss its turn.

        Raises:
            InternalError: a group is at a loss, see `Scheduler.schedule`.
        """
        if any(group.waits_for_answers for group in self.groups):
            return None
        step, serving = self._step + 1, tuple(self._serving())
        plans = [
            group.schedule(step) if index in serving else None
            for index, group in enumerate(self.groups)
        ]
        if not any(plan is not None for plan in plans):
            return None
        self._step = step
        num_tokens = tuple(plan.num_tokens if plan is not None else 0 for plan in plans)
        scheme, reason = self._choose_scheme(max(num_tokens))
        return LockstepPlan(
            header=StepHeader(
                step=step,
                num_tokens=num_tokens,
                scheme=scheme,
                reason=reason,
                experts=self._expert_orders(),
            ),
            plans=tuple(plan or SchedulerOutput(step=step) for plan in plans),
            groups=serving,
        )

    def update_from_output(
        self, plan: LockstepPlan, output: LockstepOutput
    ) -> list[GenerationDelta]:
        """Take in the answers to `plan`, the oldest one in flight, in the order of the groups.

        Raises:
            InternalError: `output` answers another plan, or an older plan has no answer yet.
        """
        deltas: list[GenerationDelta] = []
        for index, answer in zip(plan.groups, output.outputs, strict=True):
            if not plan.header.is_idle(index):
                deltas += self.groups[index].update_from_output(plan.plans[index], answer)
            elif answer.step != plan.step:
                raise InternalError(
                    f"Group {index} answered step {answer.step} instead of {plan.step}."
                )
        return deltas

    def restart(self, *, keeps_cache: bool = False) -> None:
        """See `Scheduler.restart`; requests stay in their groups while these have ranks.

        Args:
            keeps_cache: groups that still have ranks kept what answered steps computed.
        """
        serving = self._serving()
        for index in serving:
            self.groups[index].restart(keeps_cache=keeps_cache)
        for index, group in enumerate(self.groups):
            if index not in serving:  # also without requests: its cache is gone
                self._hand_over(group.hand_over())

    def stats(self) -> ReplicaStats:
        """The load of all groups together; blocks are those of groups that have ranks."""
        serving = self._serving()
        return sum_stats(
            self._step,
            [
                load if index in serving else replace(load, kv_blocks_total=0, kv_blocks_free=0)
                for index, load in enumerate(group.stats() for group in self.groups)
            ],
        )

    def check_invariants(self) -> None:
        """For tests: every group agrees with its requests.

        Raises:
            InternalError: what is wrong.
        """
        for group in self.groups:
            group.check_invariants()

    def _hand_over(self, families: Sequence[list[EngineRequest]]) -> None:
        """Requests of a group without ranks go to the others, all choices of one to the same."""
        serving, taken = self._serving(), dict[str, Scheduler]()
        for family in families:
            request_id, num_tokens = family[0].request_id, family[0].num_tokens
            if request_id not in taken:
                views = [
                    GroupView(stats=self.groups[index].stats(), num_cached_tokens=0)
                    for index in serving
                ]
                chosen = choose_group(num_tokens, self.config.block_size, views)
                taken[request_id] = self.groups[serving[chosen]]
            taken[request_id].adopt(family)


def sum_stats(step: int, groups: Sequence[ReplicaStats]) -> ReplicaStats:
    """The load of several schedulers as that of one."""
    names = [name for name in ReplicaStats.__slots__ if name != "step"]
    return ReplicaStats(
        step=step, **{name: sum(getattr(load, name) for load in groups) for name in names}
    )
