"""Runs one step of one rank: rows, inputs, forward pass, logits, tokens. Nothing else.

Charter. The runner owns the rank's rows, KV tensors and pooling sums and calls the model. It
decides nothing about scheduling, holds no text, opens no sockets, knows no Ray and no family of
models; features go into the part that owns them (`sampling/`, `input_batch`, `pooling`, ...), not
in here. Keep this file under 300 lines.

Invariants: every rank makes the same collective calls in the same order for the same plan, so
what a step computes may depend on plan and rows only. Every rank samples, from equal logits, and
appends the tokens to its rows: the next plan may be made before they are known. Only the output
rank answers. A fault of one request ends that request; a fault of the step leaves by exception.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from replicas.engine.scheduler_output import SchedulerOutput, StepOutput
from replicas.kernels.select import compiled_draws
from replicas.layers.weights import WeightProvider
from replicas.models.decoder import DecoderModel
from replicas.sampling.acceptance import verdicts
from replicas.sampling.logprobs import token_logprobs
from replicas.sampling.sampler import NOT_FINITE, Sampler
from replicas.worker.decode_graphs import GraphedModel
from replicas.worker.device import out_of_memory_as_error
from replicas.worker.input_batch import StepInput, build_step_input
from replicas.worker.kv_tensors import copy_blocks
from replicas.worker.pooling import PoolingStates
from replicas.worker.request_rows import RequestRows
from replicas.worker.step_answers import StepAnswers

# Logits of a long prompt would not fit (4k tokens of a 150k vocabulary are 2.4 GB in fp32).
_SCORED_ROWS_AT_ONCE = 256


class ModelRunner:
    """Executes plans on one rank.

    Args:
        model: this rank's share of the model.
        weights: where the model's weights come from.
        kv_caches: (2, N, B, G, P) per layer; written by every step.
        block_size: B.
        max_context: most tokens a request may hold.
        is_output_rank: whether this rank answers.
        clock: seconds, monotonic.
    """

    def __init__(  # noqa: PLR0913 - where a rank is put together
        self,
        model: DecoderModel,
        weights: WeightProvider,
        kv_caches: Sequence[torch.Tensor],
        *,
        block_size: int,
        max_context: int,
        is_output_rank: bool,
        clock: Callable[[], float],
    ) -> None:
        self._model = model
        self._weights = weights
        self._kv_caches = kv_caches
        self._device = kv_caches[0].device
        self._block_size = block_size
        self._is_output_rank = is_output_rank
        self._clock = clock
        self._ended_s: float | None = None
        self._sampler = Sampler(compiled_draws(model.kernels))
        self._max_context = max_context
        self.forget_rows()

    def forget_rows(self) -> None:
        """Drop all live requests; what is in the cache stays."""
        self._pooling = PoolingStates()
        self._rows = RequestRows(
            vocab_size=self._model.arch.vocab_size,
            max_context=self._max_context,
            block_size=self._block_size,
            wants_logprobs=self._is_output_rank,
        )

    @property
    def model(self) -> DecoderModel:
        """This rank's share of the model."""
        return self._model

    @property
    def weights(self) -> WeightProvider:
        """Where the model's weights come from."""
        return self._weights

    @property
    def num_rows(self) -> int:
        """Live requests on this rank."""
        return len(self._rows)

    @property
    def replays_decodes(self) -> bool:
        """Whether decode steps of some size are replayed from a captured graph."""
        return isinstance(self._model, GraphedModel) and self._model.num_captured > 0

    @torch.inference_mode()
    def settle(self) -> None:
        """Do what only helps later steps; to be called after a step has been answered."""
        if isinstance(self._model, GraphedModel):
            self._model.settle()

    @torch.inference_mode()
    def execute(
        self, plan: SchedulerOutput, on_nearly_done: Callable[[], None] | None = None
    ) -> StepOutput:
        """Run one step; plans come in the order the scheduler made them.

        Args:
            on_nearly_done: called when the layers are computed and sampling begins.

        On a device the time of the forward pass shows up where the host first waits for it,
        which is under `sample`.

        Returns:
            Results on the output rank; on other ranks an output without results.

        Raises:
            InternalError: the plan contradicts what this rank knows.
            DeviceOutOfMemoryError: the device ran out of memory.
            CollectiveTimeoutError, WorkerDiedError: a peer is late or gone.
        """
        started_s = self._clock()
        idle_s = started_s - (self._ended_s or started_s)
        self._apply(plan)
        if not plan.keys:
            self._ended_s = self._clock()
            return StepOutput(step=plan.step, duration_s=self._ended_s - started_s, idle_s=idle_s)
        inputs = build_step_input(plan, self._rows, self._block_size, self._device)
        built_s = self._clock()
        with out_of_memory_as_error("running a step"):
            hidden_TD = self._model.forward(inputs.forward, self._weights, self._kv_caches)
            computed_s = self._clock()
            if on_nearly_done is not None:
                on_nearly_done()
            answers = self._answer(plan, inputs, hidden_TD)
        self._ended_s = ended_s = self._clock()
        return StepOutput(
            step=plan.step,
            results=answers.results(),
            duration_s=ended_s - started_s,
            sign_s=ended_s - computed_s if on_nearly_done is not None else 0.0,
            idle_s=idle_s,
            timings_s={
                "input_build": built_s - started_s,
                "forward": computed_s - built_s,
                "sample": ended_s - computed_s,
            },
        )

    @torch.inference_mode()
    def stand_by(self, plan: SchedulerOutput) -> StepOutput:
        """Take part in a step whose plan for this rank is empty: exchanges with zero rows only.

        Raises:
            CollectiveTimeoutError, WorkerDiedError: a peer is late or gone.
        """
        started_s = self._clock()
        self._apply(plan)
        self._model.forward_idle(self._weights)
        return StepOutput(step=plan.step, duration_s=self._clock() - started_s)

    def _apply(self, plan: SchedulerOutput) -> None:
        for key in plan.finished_keys:
            self._pooling.forget(key)
        self._rows.apply(plan)
        if plan.block_copies:
            copy_blocks(self._kv_caches, plan.block_copies)

    def _answer(
        self, plan: SchedulerOutput, inputs: StepInput, hidden_TD: torch.Tensor
    ) -> StepAnswers:
        answers = StepAnswers()
        if self._is_output_rank and self._rows.has_errors:
            for key in plan.keys:
                if error := self._rows.error_of(key):
                    answers.fail(key, error)
        self._score_prompts(plan, inputs, hidden_TD, answers)
        self._sample(plan, inputs, hidden_TD, answers)
        if self._is_output_rank and self._rows.pooling:
            self._pool(plan, inputs, hidden_TD, answers)
        return answers

    def _sample(
        self,
        plan: SchedulerOutput,
        inputs: StepInput,
        hidden_TD: torch.Tensor,
        answers: StepAnswers,
    ) -> None:
        sampling, rows = inputs.sampling, inputs.sampled
        if not sampling.size:
            return
        # Of a step of decodes all rows are wanted, in order.
        if len(rows.hidden_row) < len(hidden_TD):
            hidden_TD = hidden_TD[torch.from_numpy(rows.hidden_row).to(self._device)]
        logits_RV = self._model.logits(hidden_TD, self._weights)
        batch = self._rows.sampling_batch(inputs.slots[rows.request], rows.position)
        indices = sampling.tolist()
        drafts = [plan.draft(index) for index in indices] if plan.draft_token_ids else ()
        found = list(verdicts(drafts, self._sampler.sample(logits_RV, batch)))
        self._rows.append_sampled(
            inputs.slots[sampling],
            [verdict[-1].token_id for verdict in found],
            np.array([len(verdict) - 1 for verdict in found], np.int64),
        )
        for index, verdict in zip(indices, found, strict=True):
            key, error = plan.keys[index], verdict[-1].error
            if error:
                self._rows.fail(key, error, plan.step)
            if self._is_output_rank:
                answers.add_sampled(key, verdict)

    def _score_prompts(
        self,
        plan: SchedulerOutput,
        inputs: StepInput,
        hidden_TD: torch.Tensor,
        answers: StepAnswers,
    ) -> None:
        scored = inputs.scored
        for part in _slices(len(scored.hidden_row), _SCORED_ROWS_AT_ONCE):
            hidden_rows = torch.from_numpy(scored.hidden_row[part]).to(self._device)
            logits_RV = self._model.logits(hidden_TD[hidden_rows], self._weights)
            if not self._is_output_rank:
                continue
            token_ids = torch.from_numpy(scored.token_id[part]).to(self._device)
            logprobs = token_logprobs(logits_RV, token_ids, scored.num_top[part])
            for index, logprob in zip(scored.request[part].tolist(), logprobs, strict=True):
                key = plan.keys[index]
                if math.isnan(logprob.logprob):
                    answers.fail(key, NOT_FINITE)
                else:
                    answers.add_prompt_logprob(key, logprob)

    def _pool(
        self,
        plan: SchedulerOutput,
        inputs: StepInput,
        hidden_TD: torch.Tensor,
        answers: StepAnswers,
    ) -> None:
        for index, key in enumerate(plan.keys):
            pooling = self._rows.pooling.get(key)
            if pooling is None:
                continue
            start, stop = inputs.query_start[index : index + 2].tolist()
            pooled = self._pooling.add(
                key,
                pooling,
                hidden_TD[start:stop],
                num_computed_tokens=plan.num_computed_tokens[index],
                num_prompt_tokens=int(self._rows.num_prompt_S[inputs.slots[index]]),
            )
            if pooled is not None:
                answers.add_pooled(key, pooled)


def _slices(length: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, length)) for start in range(0, length, step))
