"""Steps that a device computes while the host goes on: given whole, seen to their end later.

See `pending_step` for what is in flight meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from replicas.engine.scheduler_output import SchedulerOutput, StepOutput
from replicas.engine.weight_traffic import traffic_of
from replicas.layers.weights import WeightProvider
from replicas.models.decoder import DecoderModel
from replicas.worker.device import out_of_memory_as_error
from replicas.worker.input_batch import build_step_input
from replicas.worker.pending_step import AsyncDevice, DeviceTokens, Mark, PendingStep
from replicas.worker.request_rows import RequestRows
from replicas.worker.row_sampling import RowSampling
from replicas.worker.step_answers import StepAnswers


class AheadSteps:
    """Gives steps of one rank to its device.

    Args:
        kv_caches: (2, N, B, G, P) per layer; written by every step.
        rows: of live requests, with each plan applied.
        sampling: of those rows.
        clock: seconds, monotonic.
    """

    def __init__(  # noqa: PLR0913 - shares a rank's parts with its runner
        self,
        device: AsyncDevice,
        model: DecoderModel,
        weights: WeightProvider,
        kv_caches: Sequence[torch.Tensor],
        *,
        rows: RequestRows,
        sampling: RowSampling,
        clock: Callable[[], float],
    ) -> None:
        self._device = device
        self._model = model
        self._weights = weights
        self._kv_caches = kv_caches
        self._rows = rows
        self._sampling = sampling
        self._clock = clock
        self._newest = DeviceTokens(kv_caches[0].device)
        self._ended: Mark | None = None

    def takes(self, plan: SchedulerOutput) -> bool:
        """Whether the device can do the whole step without the host reading a number of it."""
        if not plan.keys or plan.draft_token_ids or self._rows.pooling:
            return False
        return self._rows.defers(self._rows.slots(plan.keys))

    def give(self, plan: SchedulerOutput, started_s: float) -> PendingStep:
        """Enqueue a whole step; nothing but an exchange of rows may wait for the device here.

        Raises:
            DeviceOutOfMemoryError: the device ran out of memory.
        """
        began = self._device.mark()
        inputs = build_step_input(
            plan, self._rows, self._rows.block_size, self._kv_caches[0].device, self._newest
        )
        built_s = self._clock()
        with out_of_memory_as_error("launching a step"):
            hidden_TD = self._model.forward(inputs.forward, self._weights, self._kv_caches)
            tokens = self._sampling.later(inputs, hidden_TD, self._newest, self._device)
        return PendingStep(
            plan=plan,
            tokens=tokens,
            began=began,
            ended=self._device.mark(),
            host_s={"input_build": built_s - started_s, "launch": self._clock() - built_s},
        )

    @torch.inference_mode()
    def collect(self, pending: PendingStep, answers: StepAnswers) -> StepOutput:
        """Wait for the oldest step given and not collected; adds its tokens to `answers`."""
        pending.ended.wait()
        self._sampling.learn(pending, answers)
        before, self._ended = self._ended, pending.ended
        return StepOutput(
            step=pending.plan.step,
            results=answers.results(),
            duration_s=pending.ended.seconds_since(pending.began),
            idle_s=0.0 if before is None else pending.began.seconds_since(before),
            timings_s=pending.host_s,
            traffic=traffic_of(self._weights),
        )

    def note_gap(self) -> None:
        """Another kind of step comes in between; how long the device idles then is not known."""
        self._ended = None
