"""Chooses the tokens of one step: who runs, who is let in, who has to make room.

Owns the queues and the blocks. Running requests go first, then waiting ones, both in order of
importance (`EngineRequest.order`). When blocks run out, waiting forks give theirs back, then
requests that end with a step in flight, then the least important running request is preempted: its
KV is dropped and computed again later, as soon as no step in flight holds a token of it. The most
important running request never gives way to another, and every request fits into an empty pool
(checked on arrival), so each step makes progress.
"""

from __future__ import annotations

from replicas.engine.kv_manager import BlockGrant, KvManager
from replicas.engine.plan_builder import PlanBuilder
from replicas.engine.request import EngineRequest, RequestStatus
from replicas.engine.request_queue import RequestQueue
from replicas.engine.scheduler_config import SchedulerConfig
from replicas.engine.scheduler_output import SchedulerOutput
from replicas.engine.speculation import MAX_SAMPLED_ROWS, Speculator
from replicas.engine.waitlist import Waitlist


class StepPlanner:
    """Queues and blocks of one engine.

    Args:
        config: limits.
        eos_token_ids: the model's end-of-sequence tokens, told to the workers.
    """

    def __init__(self, config: SchedulerConfig, eos_token_ids: tuple[int, ...]) -> None:
        self._config = config
        self._eos_token_ids = eos_token_ids
        self.kv = KvManager(config.num_blocks, config.block_size, config.prefix_caching)
        self.running = RequestQueue()
        self.waiting = Waitlist()
        self.speculator = Speculator(config.speculation)
        self._max_sampled_rows = max(config.max_running_requests, MAX_SAMPLED_ROWS)
        self._finished_keys: list[int] = []
        self.num_preemptions = 0
        self.prefix_hit_tokens = 0
        self.prefix_query_tokens = 0

    @property
    def waits_for_answers(self) -> bool:
        """Whether a request's draft is being checked, so that nobody knows where it goes on; or a
        draft could be made, and have room, once the steps in flight have answered."""
        if self._config.speculation is None:
            return False
        room = min(self._config.max_step_tokens, self._max_sampled_rows) - len(self.running)
        return any(
            request.num_draft_tokens or (room > 0 and self.speculator.waits(request))
            for request in self.running
        )

    def plan(self, step: int) -> SchedulerOutput | None:
        """Plan a step, which has to be sent; None when there is nothing to compute now."""
        builder = PlanBuilder(step, self._config.max_step_tokens, self._eos_token_ids)
        num_preemptions = self.num_preemptions
        self._schedule_running(builder)
        if self.num_preemptions == num_preemptions:
            self._schedule_waiting(builder)
        if not len(builder):
            return None
        plan = builder.build(self._finished_keys)
        self._finished_keys = []
        return plan

    def serve_forks(self, parent: EngineRequest) -> list[EngineRequest]:
        """Give the choices that wait for this one's computed prompt a share in its blocks."""
        forks = self.waiting.take_forks(parent)
        for fork in forks:
            self.kv.fork(parent, fork)
            fork.num_cached_tokens = parent.num_cached_tokens
            self.waiting.add(fork, shares_blocks=self.kv.holds_blocks(fork))
        return forks

    def remove(self, request: EngineRequest) -> None:
        """Drop a choice that has ended, with its blocks and the workers' row.

        Choices that waited for its prompt get a new parent among themselves.
        """
        if request.status is RequestStatus.RUNNING:
            self.running.remove(request)
        else:
            self.waiting.remove(request)
        request.status = RequestStatus.FINISHED
        heirs = self.waiting.take_forks(request)
        if heirs:
            self.waiting.add_family(heirs)
        self.kv.forget(request)
        self.speculator.forget(request)
        self._drop_row(request)

    def restart(self, *, keeps_cache: bool = False) -> None:
        """The workers' rows are gone: all that ran waits again.

        Args:
            keeps_cache: blocks that answered steps have filled are as they were, and found again
                as prefixes; else every block's content is gone.
        """
        for request in list(self.running):
            self._preempt(request)
        self._finished_keys.clear()
        if keeps_cache:
            return
        while self._take_back_blocks():
            pass
        config = self._config
        self.kv = KvManager(config.num_blocks, config.block_size, config.prefix_caching)

    def _schedule_running(self, builder: PlanBuilder) -> None:
        """Most important first; one token each is kept back for those that follow.

        Victims of preemption come from the end of the same order, so a request that is in the
        plan is never preempted in the same step.
        """
        ready = [request for request in self.running if request.num_uncomputed_tokens]
        ending = [request for request in self.running if not request.num_uncomputed_tokens]
        index = 0
        while index < len(ready) and builder.budget > 0:
            request = ready[index]
            num_following = len(ready) - index - 1
            share = max(1, builder.budget - num_following)
            num_tokens = min(request.num_uncomputed_tokens, share)
            if not self._add_with_draft(request, builder, share, num_following):
                grant = self._allocate_or_preempt(request, num_tokens, ready, ending)
                if grant is None:
                    return
                builder.add(request, num_tokens, grant, self.kv.block_table(request))
            index += 1

    def _add_with_draft(
        self, request: EngineRequest, builder: PlanBuilder, share: int, num_following: int
    ) -> bool:
        """Schedule a decoding request with a draft, if there is one and there is room for it.

        A draft never costs another request anything: `num_following` ones keep a row of logits and
        a block each.
        """
        if request.num_pending_tokens or request.num_uncomputed_tokens != 1:
            return False
        rows = self._max_sampled_rows - builder.num_sampled_rows - num_following
        draft = self.speculator.draft(request, min(share, rows) - 1)
        if not draft:
            return False
        grant = self.kv.allocate_slots(request, 1 + len(draft), headroom=num_following)
        if grant is None:
            return False
        builder.add(request, 1, grant, self.kv.block_table(request), draft)
        return True

    def _allocate_or_preempt(
        self,
        request: EngineRequest,
        num_tokens: int,
        ready: list[EngineRequest],
        ending: list[EngineRequest],
    ) -> BlockGrant | None:
        """Blocks for a running request at the cost of less important ones; None: its own."""
        while True:
            grant = self.kv.allocate_slots(request, num_tokens)
            if grant is not None:
                return grant
            if self._take_back_blocks():
                continue
            if ending:
                # It never runs again, so nothing is computed twice.
                self._preempt(ending.pop())
                continue
            victim = ready.pop()
            self._preempt(victim)
            self.num_preemptions += 1
            if victim is request:
                return None

    def _schedule_waiting(self, builder: PlanBuilder) -> None:
        # Running requests that are not in the plan end with a step in flight.
        while builder.budget > 0 and len(builder) < self._config.max_running_requests:
            if builder.num_sampled_rows >= self._max_sampled_rows:
                return
            request = self.waiting.first
            if request is None or request.num_steps_in_flight:
                return
            if not self._admit(request, builder):
                return

    def _admit(self, request: EngineRequest, builder: PlanBuilder) -> bool:
        """Move the first waiting request into the step, if blocks allow.

        Blocks for the rest of its tokens must stay free, and one for each running request, which
        will need it before long: a request let in only to be preempted computes its prompt twice.
        """
        while True:
            shares_blocks = self.kv.holds_blocks(request)
            prefix = [] if shares_blocks else self.kv.find_prefix(request)
            num_hit_tokens = len(prefix) * self._config.block_size
            start = request.num_computed_tokens if shares_blocks else num_hit_tokens
            num_tokens = min(request.num_tokens - start, builder.budget)
            later = self.kv.num_blocks_for(request.num_tokens) - self.kv.num_blocks_for(
                start + num_tokens
            )
            grant = self.kv.allocate_slots(request, num_tokens, prefix, len(self.running) + later)
            if grant is not None:
                break
            # With nothing running, only waiting forks can hold the missing blocks.
            if self.running or not self._take_back_blocks():
                return False
        self._start(request, num_hit_tokens)
        request.num_computed_tokens = request.num_answered_tokens = start
        builder.add(request, num_tokens, grant, self.kv.block_table(request))
        return True

    def _start(self, request: EngineRequest, num_hit_tokens: int) -> None:
        """From waiting to running; only the first admission counts as a cache query."""
        self.waiting.remove(request)
        if request.num_cached_tokens is None:
            # Of a resumed request output may be found too, which nobody asked for as prompt.
            request.num_cached_tokens = min(num_hit_tokens, request.num_prompt_tokens)
            self.prefix_hit_tokens += request.num_cached_tokens
            self.prefix_query_tokens += request.num_prompt_tokens
        request.status = RequestStatus.RUNNING
        self.running.add(request)

    def _preempt(self, request: EngineRequest) -> None:
        """Drop a running request's KV; it comes back as a new row with all its tokens."""
        self.running.remove(request)
        self.kv.release(request)
        self._drop_row(request)
        request.num_computed_tokens = request.num_answered_tokens = 0
        request.status = RequestStatus.PREEMPTED
        self.waiting.add(request)

    def _take_back_blocks(self) -> bool:
        """Make one waiting fork give its blocks back; it will compute its prompt itself."""
        request = self.waiting.take_sharer()
        if request is None:
            return False
        self.kv.release(request)
        request.num_computed_tokens = request.num_answered_tokens = 0
        self.waiting.reweigh(request)
        return True

    def _drop_row(self, request: EngineRequest) -> None:
        if request.has_row:
            self._finished_keys.append(request.key)
            request.has_row = False
