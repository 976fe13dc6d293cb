"""From a step's hidden states to one more token in each row: at once, or behind the device.

Every rank does it, from equal logits; only the output rank tells.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from replicas.engine.scheduler_output import SchedulerOutput
from replicas.kernels.select import compiled_draws
from replicas.kernels.uploads import on_device
from replicas.layers.weights import WeightProvider
from replicas.models.decoder import DecoderModel
from replicas.models.greedy_head import Forwarded, GreedyHead
from replicas.sampling.acceptance import verdicts
from replicas.sampling.params_batch import ParamsBatch
from replicas.sampling.sampler import SampledRow, Sampler
from replicas.worker.input_batch import StepInput
from replicas.worker.pending_step import AsyncDevice, DeviceTokens, PendingStep, PendingTokens
from replicas.worker.request_rows import RequestRows
from replicas.worker.step_answers import StepAnswers


class RowSampling:
    """Samples for one rank's rows.

    Args:
        rows: written: tokens and failures.
        is_output_rank: whether this rank answers.
    """

    def __init__(
        self,
        model: DecoderModel,
        weights: WeightProvider,
        rows: RequestRows,
        *,
        is_output_rank: bool,
    ) -> None:
        self._model = model
        self._weights = weights
        self._rows = rows
        self._is_output_rank = is_output_rank
        self._sampler = Sampler(compiled_draws(model.kernels))
        self._greedy = GreedyHead.of(model)

    def forward(
        self,
        inputs: StepInput,
        kv_caches: Sequence[torch.Tensor],
        on_computed: Callable[[], None] | None,
    ) -> Forwarded:
        """The model's forward pass; with tokens where every row is to get its largest logit's.

        Args:
            on_computed: called once, when the layers are computed.
        """
        batch = inputs.forward
        if self._greedy is not None and self._wants_all_largest(inputs):
            return self._greedy.forward(self._model, batch, self._weights, kv_caches, on_computed)
        hidden_TD = self._model.forward(batch, self._weights, kv_caches)
        if on_computed is not None:
            on_computed()
        return Forwarded(hidden_TD=hidden_TD)

    def now(
        self,
        plan: SchedulerOutput,
        inputs: StepInput,
        forwarded: Forwarded,
        answers: StepAnswers,
    ) -> None:
        """Tokens of the rows that sample, drafts checked; waits for the device."""
        sampling = inputs.sampling
        if not sampling.size:
            return
        sampled = self._greedy_rows(inputs, forwarded)
        if sampled is None:
            sampled = self._sampler.sample(*self._logits(inputs, forwarded.hidden_TD))
        indices = sampling.tolist()
        drafts = [plan.draft(index) for index in indices] if plan.draft_token_ids else ()
        found = list(verdicts(drafts, sampled))
        self._rows.append_sampled(
            inputs.slots[sampling],
            [verdict[-1].token_id for verdict in found],
            np.array([len(verdict) - 1 for verdict in found], np.int64),
        )
        for index, verdict in zip(indices, found, strict=True):
            self._tell(plan, index, verdict, answers)

    def later(
        self,
        inputs: StepInput,
        hidden_TD: torch.Tensor,
        newest: DeviceTokens,
        device: AsyncDevice,
    ) -> PendingTokens:
        """The same, enqueued: each row is longer by a token that only the device knows."""
        slots = inputs.slots[inputs.sampling]
        told: list[SampledRow] | None = None
        tokens_R = torch.empty(0, dtype=torch.int64)
        if slots.size:
            logits_RV, batch = self._logits(inputs, hidden_TD)
            try:
                sampled_R = self._sampler.launch(logits_RV, batch)
            except Exception:  # one row's fault must not be all rows': see `Sampler.sample`
                told = self._sampler.sample(logits_RV, batch)
                ids = np.array([row.token_id for row in told], np.int64)
                sampled_R = on_device(ids, logits_RV.device)
            newest.keep(slots, sampled_R)
            tokens_R = device.read_back(sampled_R)
        return PendingTokens(
            sampling=inputs.sampling,
            slots=slots,
            positions=self._rows.append_unknown(slots),
            token_ids=tokens_R,
            told=told,
        )

    def learn(self, step: PendingStep, answers: StepAnswers) -> None:
        """Fill in what `later` has left open, now that the device has come past it."""
        tokens = step.tokens
        ids_R = np.array(tokens.token_ids.numpy(), np.int64)
        self._rows.learn([step.plan.keys[index] for index in tokens.sampling], tokens, ids_R)
        told = self._sampler.told(ids_R) if tokens.told is None else tokens.told
        for index, row in zip(tokens.sampling.tolist(), told, strict=True):
            self._tell(step.plan, index, (row,), answers)

    def _tell(
        self,
        plan: SchedulerOutput,
        index: int,
        verdict: Sequence[SampledRow],
        answers: StepAnswers,
    ) -> None:
        key, error = plan.keys[index], verdict[-1].error
        if error:
            self._rows.fail(key, error, plan.step)
        if self._is_output_rank:
            answers.add_sampled(key, verdict)

    def _wants_all_largest(self, inputs: StepInput) -> bool:
        """Whether each row of the step samples, and wants its largest logit and nothing else."""
        request = inputs.sampled.request
        return len(request) == len(inputs.forward.positions_T) and (
            self._rows.params.all_plain_greedy(inputs.slots[request])
        )

    def _greedy_rows(self, inputs: StepInput, forwarded: Forwarded) -> list[SampledRow] | None:
        """Tokens without logits; None where these have to say."""
        tokens = forwarded.tokens
        if tokens is None:
            slots = inputs.slots[inputs.sampled.request]
            if self._greedy is None or not self._rows.params.all_plain_greedy(slots):
                return None
            tokens = self._greedy.tokens(_wanted(inputs, forwarded.hidden_TD), self._weights)
        return None if tokens is None else [SampledRow(token_id=token_id) for token_id in tokens]

    def _logits(
        self, inputs: StepInput, hidden_TD: torch.Tensor
    ) -> tuple[torch.Tensor, ParamsBatch]:
        """Logits of the rows that sample, and how."""
        rows = inputs.sampled
        batch = self._rows.sampling_batch(inputs.slots[rows.request], rows.position)
        return self._model.logits(_wanted(inputs, hidden_TD), self._weights), batch


def _wanted(inputs: StepInput, hidden_TD: torch.Tensor) -> torch.Tensor:
    """Hidden states of the rows that sample; of a step of decodes all, in order."""
    hidden_row = inputs.sampled.hidden_row
    if len(hidden_row) == len(hidden_TD):
        return hidden_TD
    return hidden_TD.index_select(0, on_device(hidden_row, hidden_TD.device))
