"""Runs the steps of one rank: rows, inputs, forward pass, logits, tokens. Nothing else.

Charter. The runner owns the rank's rows and KV tensors and calls the model. It decides nothing
about scheduling, holds no text, opens no sockets, knows no Ray and no family of models; features
go into the part that owns them (`sampling/`, `input_batch`, ...), not in here. 300 lines at most.

Invariants: every rank makes the same collective calls in the same order for the same plan, so
what a step computes may depend on plan and rows only. Every rank samples, from equal logits, and
appends the tokens to its rows: the next plan may be made before they are known. Only the output
rank answers. A fault of one request ends that request; a fault of the step leaves by exception.

A step has two halves: `launch` gives the device all of its work, `finish` waits for it. On a device
that computes beside the host, the next step may be launched in between (see `pending_step`);
elsewhere `launch` does everything.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from cluster.base.errors import InternalError
from replicas.engine.scheduler_output import SchedulerOutput, StepOutput
from replicas.engine.weight_traffic import traffic_of
from replicas.layers.weights import WeightProvider
from replicas.models.decoder import DecoderModel
from replicas.worker.ahead_steps import AheadSteps
from replicas.worker.decode_graphs import GraphedModel
from replicas.worker.device import out_of_memory_as_error
from replicas.worker.input_batch import build_step_input
from replicas.worker.kv_tensors import copy_blocks
from replicas.worker.pending_step import AsyncDevice, LaunchedStep
from replicas.worker.prompt_outputs import PromptOutputs
from replicas.worker.request_rows import RequestRows
from replicas.worker.row_sampling import RowSampling
from replicas.worker.step_answers import StepAnswers

if TYPE_CHECKING:
    from replicas.sampling.grammars import Grammars

SayDone = Callable[[], None]


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
        device: of the caches, where it computes while the host goes on; None: it does not.
        grammars: what outputs are bound to; None refuses requests that are.
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
        device: AsyncDevice | None = None,
        grammars: Grammars | None = None,
    ) -> None:
        self._model = model
        self._weights = weights
        self._kv_caches = kv_caches
        self._device = kv_caches[0].device
        self._async = device
        self._block_size = block_size
        self._is_output_rank = is_output_rank
        self._clock = clock
        self._max_context = max_context
        self._grammars = grammars
        self.forget_rows()

    def forget_rows(self) -> None:
        """Drop all live requests, steps in flight too; what is in the cache stays."""
        self._in_flight: list[LaunchedStep] = []
        self._prompts = PromptOutputs(
            self._model, self._weights, is_output_rank=self._is_output_rank
        )
        if self._grammars is not None:
            self._grammars.clear_all()
        self._rows = RequestRows(
            vocab_size=self._model.arch.vocab_size,
            max_context=self._max_context,
            block_size=self._block_size,
            grammars=self._grammars,
            wants_logprobs=self._is_output_rank,
        )
        self._sampling = RowSampling(
            self._model, self._weights, self._rows, is_output_rank=self._is_output_rank
        )
        self._ahead = None
        if self._async is not None:
            self._ahead = AheadSteps(
                self._async,
                self._model,
                self._weights,
                self._kv_caches,
                rows=self._rows,
                sampling=self._sampling,
                clock=self._clock,
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
    def runs_ahead(self) -> bool:
        """Whether it is of use to launch a step before the one ahead of it is finished."""
        return self._async is not None

    @property
    def replays_decodes(self) -> bool:
        """Whether decode steps of some size are replayed from a captured graph."""
        return isinstance(self._model, GraphedModel) and self._model.num_captured > 0

    @property
    def wants_to_settle(self) -> bool:
        """Whether `settle` has something to do; the same on every rank after the same step."""
        return isinstance(self._model, GraphedModel) and self._model.wants_to_settle

    def settle(self) -> None:
        """Do what only helps later steps; to be called after a step has been answered."""
        if isinstance(self._model, GraphedModel):
            with torch.inference_mode():
                self._model.settle()

    def execute(
        self, plan: SchedulerOutput, on_nearly_done: SayDone | None = None, waited_s: float = 0.0
    ) -> StepOutput:
        """Run one step, both halves; see `launch` and `finish`."""
        return self.finish(self.launch(plan, on_nearly_done, waited_s))

    @torch.inference_mode()
    def launch(
        self, plan: SchedulerOutput, on_nearly_done: SayDone | None = None, waited_s: float = 0.0
    ) -> LaunchedStep:
        """Begin one step; plans come in the order the scheduler made them.

        At most one step may be unfinished. Waits for nothing where the device computes beside the
        host and the step needs no look at its numbers; else it sees the step ahead to its end and
        then does all of this one.

        Args:
            on_nearly_done: called when the layers are computed, if the host is not ahead of them.
            waited_s: for the plan; told on as idle time, unless a device knows better.

        Raises:
            InternalError: the plan contradicts what this rank knows.
            DeviceOutOfMemoryError: the device ran out of memory.
            CollectiveTimeoutError, WorkerDiedError: a peer is late or gone.
        """
        if len(self._in_flight) > 1:
            raise InternalError("Two steps are in flight and a third one is launched.")
        started_s = self._clock()
        self._apply(plan)
        if self._ahead is not None and self._ahead.takes(plan):
            step = LaunchedStep(pending=self._ahead.give(plan, started_s))
        else:
            for ahead in self._in_flight:
                self._complete(ahead)
            output = self._run(plan, started_s, on_nearly_done, waited_s)
            step = LaunchedStep(output=output)
        self._in_flight.append(step)
        return step

    def finish(self, step: LaunchedStep) -> StepOutput:
        """Wait for the oldest step launched and not finished.

        Returns:
            Results on the output rank; on other ranks an output without results.

        Raises:
            InternalError: it is not the oldest.
        """
        if not self._in_flight or self._in_flight.pop(0) is not step:
            raise InternalError("Steps are finished in the order of their launch.")
        return self._complete(step)

    @torch.inference_mode()
    def stand_by(self, plan: SchedulerOutput) -> StepOutput:
        """Take part in a step whose plan for this rank is empty: exchanges with zero rows only.

        Raises:
            CollectiveTimeoutError, WorkerDiedError: a peer is late or gone.
        """
        started_s = self._clock()
        self._note_gap()  # not idle: it computes for others
        self._apply(plan)
        self._model.forward_idle(self._weights)
        return StepOutput(step=plan.step, duration_s=self._clock() - started_s)

    def _apply(self, plan: SchedulerOutput) -> None:
        for key in plan.finished_keys:
            self._prompts.forget(key)
        self._rows.apply(plan)
        if plan.block_copies:
            copy_blocks(self._kv_caches, plan.block_copies)

    def _note_gap(self) -> None:
        if self._ahead is not None:
            self._ahead.note_gap()

    def _complete(self, step: LaunchedStep) -> StepOutput:
        """The output of a step in flight; waits for it, the first time."""
        if step.pending is not None:
            assert self._ahead is not None
            answers = self._answers(step.pending.plan)
            step.output, step.pending = self._ahead.collect(step.pending, answers), None
        assert step.output is not None
        return step.output

    def _run(
        self, plan: SchedulerOutput, started_s: float, on_nearly_done: SayDone | None, idle_s: float
    ) -> StepOutput:
        """A whole step, from its inputs to its answers; on a device the time of the forward pass
        shows up where the host first waits for it, under `sample`."""
        self._note_gap()
        if not plan.keys:
            duration_s = self._clock() - started_s
            return StepOutput(step=plan.step, duration_s=duration_s, idle_s=idle_s)
        inputs = build_step_input(plan, self._rows, self._block_size, self._device)
        built_s = self._clock()
        with out_of_memory_as_error("running a step"):
            forwarded = self._sampling.forward(inputs, self._kv_caches, on_nearly_done)
            hidden_TD, computed_s = forwarded.hidden_TD, self._clock() - forwarded.head_s
            answers = self._answers(plan)
            self._prompts.score(plan, inputs, hidden_TD, answers)
            self._sampling.now(plan, inputs, forwarded, answers)
            self._prompts.pool(plan, inputs, hidden_TD, self._rows, answers)
        ended_s = self._clock()
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
            traffic=traffic_of(self._weights),
        )

    def _answers(self, plan: SchedulerOutput) -> StepAnswers:
        answers = StepAnswers()
        faults = self._rows.faults
        if self._is_output_rank and faults:
            for key in plan.keys:
                if error := faults.of(key):
                    answers.fail(key, error)
        return answers
