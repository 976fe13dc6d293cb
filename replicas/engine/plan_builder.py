"""Collects one step's plan, column by column, in batch order.

It decides nothing. Adding a request records, on the request, where it will stand once the plan is
executed; so a plan that was built has to be sent.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from replicas.engine.kv_manager import BlockGrant
from replicas.engine.request import EngineRequest
from replicas.engine.scheduler_output import NewRequest, SchedulerOutput


class PlanBuilder:
    """The plan of one step under construction.

    Args:
        step: number of the step.
        budget: query tokens the step may have.
        eos_token_ids: the model's end-of-sequence tokens.
    """

    def __init__(self, step: int, budget: int, eos_token_ids: tuple[int, ...]) -> None:
        self._step = step
        self._eos_token_ids = eos_token_ids
        self.budget = budget
        """Query tokens still free."""
        self._new_requests: list[NewRequest] = []
        self._keys: list[int] = []
        self._num_scheduled: list[int] = []
        self._num_computed: list[int] = []
        self._new_blocks: list[tuple[int, ...]] = []
        self._replaced: list[tuple[int, int, int]] = []
        self._copies: list[tuple[int, int]] = []
        self._samples: list[bool] = []
        self._drafts: list[tuple[int, ...]] = []
        self.num_sampled_rows = 0
        """Rows of logits that the step samples from."""

    def __len__(self) -> int:
        return len(self._keys)

    def add(
        self,
        request: EngineRequest,
        num_tokens: int,
        grant: BlockGrant,
        table: Sequence[int],
        draft: tuple[int, ...] = (),
    ) -> None:
        """Schedule the next `num_tokens` tokens of a request, and a draft of those after them.

        Args:
            grant: what changed in its block table for this step.
            table: the whole block table, sent when the workers have no row for the request.
        """
        if request.has_row:
            self._new_blocks.append(grant.new_blocks)
            for index, block in grant.replaced:
                self._replaced.append((request.key, index, block))
        else:
            self._new_requests.append(self._new_request(request))
            self._new_blocks.append(tuple(table))
        self._copies.extend(grant.copies)
        start, end = request.num_computed_tokens, request.num_computed_tokens + num_tokens
        samples = request.generates and end == request.num_tokens + request.num_pending_tokens
        self._keys.append(request.key)
        self._num_scheduled.append(num_tokens + len(draft))
        self._num_computed.append(start)
        self._samples.append(samples)
        self._drafts.append(draft)
        self.budget -= num_tokens + len(draft)
        self.num_sampled_rows += samples + len(draft)
        request.has_row = True
        request.num_computed_tokens = end + len(draft)
        request.num_draft_tokens = len(draft)
        request.num_pending_tokens += samples
        request.num_steps_in_flight += 1

    def build(self, finished_keys: Sequence[int]) -> SchedulerOutput:
        """The plan."""
        return SchedulerOutput(
            step=self._step,
            new_requests=tuple(self._new_requests),
            keys=tuple(self._keys),
            num_scheduled_tokens=tuple(self._num_scheduled),
            num_computed_tokens=tuple(self._num_computed),
            new_block_ids=tuple(self._new_blocks),
            replaced_blocks=tuple(self._replaced),
            block_copies=tuple(self._copies),
            samples=tuple(self._samples),
            draft_token_ids=tuple(self._drafts) if any(self._drafts) else (),
            finished_keys=tuple(finished_keys),
        )

    def _new_request(self, request: EngineRequest) -> NewRequest:
        params = request.params
        if params.prompt_logprobs is not None and not request.wants_scores:
            # They all went out before (a fork's, or before a preemption): spare the workers.
            params = dataclasses.replace(params, prompt_logprobs=None)
        return NewRequest(
            key=request.key,
            token_ids=tuple(request.token_ids),
            num_prompt_tokens=request.num_prompt_tokens,
            params=params,
            choice_index=request.index,
            pooling=request.pooling,
            eos_token_ids=() if params.ignore_eos else self._eos_token_ids,
        )
