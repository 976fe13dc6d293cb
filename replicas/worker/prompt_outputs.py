"""What a step says of prompts: logprobs of their tokens, pooled embeddings.

Owns the pooling sums. Scoring computes logits, which is a collective: every rank calls it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from replicas.engine.scheduler_output import SchedulerOutput
from replicas.kernels.uploads import on_device
from replicas.layers.weights import WeightProvider
from replicas.models.decoder import DecoderModel
from replicas.sampling.logprobs import token_logprobs
from replicas.sampling.sampler import NOT_FINITE
from replicas.worker.input_batch import StepInput
from replicas.worker.pooling import PoolingStates
from replicas.worker.request_rows import RequestRows
from replicas.worker.step_answers import StepAnswers

# Logits of a long prompt would not fit (4k tokens of a 150k vocabulary are 2.4 GB in fp32).
_SCORED_ROWS_AT_ONCE = 256


class PromptOutputs:
    """Prompt logprobs and embeddings of one rank's live requests.

    Args:
        is_output_rank: whether this rank answers; others only help to compute.
    """

    def __init__(
        self, model: DecoderModel, weights: WeightProvider, *, is_output_rank: bool
    ) -> None:
        self._model = model
        self._weights = weights
        self._is_output_rank = is_output_rank
        self._pooling = PoolingStates()

    def forget(self, key: int) -> None:
        """A request is gone."""
        self._pooling.forget(key)

    def score(
        self,
        plan: SchedulerOutput,
        inputs: StepInput,
        hidden_TD: torch.Tensor,
        answers: StepAnswers,
    ) -> None:
        """Logprobs of the prompt tokens of this step that are asked for."""
        scored = inputs.scored
        for part in _slices(len(scored.hidden_row), _SCORED_ROWS_AT_ONCE):
            hidden_rows = on_device(scored.hidden_row[part], hidden_TD.device)
            logits_RV = self._model.logits(hidden_TD.index_select(0, hidden_rows), self._weights)
            if not self._is_output_rank:
                continue
            token_ids = on_device(scored.token_id[part], hidden_TD.device)
            logprobs = token_logprobs(logits_RV, token_ids, scored.num_top[part])
            for index, logprob in zip(scored.request[part].tolist(), logprobs, strict=True):
                key = plan.keys[index]
                if math.isnan(logprob.logprob):
                    answers.fail(key, NOT_FINITE)
                else:
                    answers.add_prompt_logprob(key, logprob)

    def pool(
        self,
        plan: SchedulerOutput,
        inputs: StepInput,
        hidden_TD: torch.Tensor,
        rows: RequestRows,
        answers: StepAnswers,
    ) -> None:
        """Add this step's hidden states to the embeddings that are wanted."""
        if not (self._is_output_rank and rows.pooling):
            return
        for index, key in enumerate(plan.keys):
            pooling = rows.pooling.get(key)
            if pooling is None:
                continue
            start, stop = inputs.query_start[index : index + 2].tolist()
            pooled = self._pooling.add(
                key,
                pooling,
                hidden_TD[start:stop],
                num_computed_tokens=plan.num_computed_tokens[index],
                num_prompt_tokens=int(rows.num_prompt_S[inputs.slots[index]]),
            )
            if pooled is not None:
                answers.add_pooled(key, pooled)


def _slices(length: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, length)) for start in range(0, length, step))
