"""A rank of a tensor-parallel replica: all ranks run the same plans, rank 0 answers."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from cluster.dist.communicator import Communicator, SingleRank
from cluster.dist.rendezvous import Rendezvous
from cluster.dist.torch_communicator import TorchCommunicator
from replicas.engine.scheduler_output import StepOutput
from replicas.worker import wire
from replicas.worker.decode_graphs import GraphedModel
from replicas.worker.frames import Payload
from replicas.worker.model_runner import ModelRunner
from replicas.worker.pending_step import LaunchedStep
from replicas.worker.plan import WorkerPlan

# A leader needs about this long to plan: a sign that comes later only costs two system calls.
_SIGN_WORTH_S = 0.5e-3
_TAIL_GAIN = 1 / 8


def join_tensor_group(plan: WorkerPlan, place: Rendezvous | None = None) -> Communicator:
    """This rank's communicator over its tensor-parallel axis.

    Args:
        place: where the ranks meet; None: where the plan says.
    """
    if plan.tp_size == 1:
        return SingleRank()
    place = place or Rendezvous(
        host=plan.store_host, port=plan.store_port, group=f"tp/{plan.epoch}"
    )
    return TorchCommunicator(
        rank=plan.tp_rank,
        size=plan.tp_size,
        backend="nccl" if plan.device == "cuda" else "gloo",
        rendezvous=place,
        timeout_s=plan.collective_timeout_s,
    )


class TensorParallelRank:
    """Executes plans on one `ModelRunner`.

    Args:
        answers: whether this rank gives the answers.
        signs: whether it says when a step is nearly done, where that is early enough to help.
    """

    def __init__(self, runner: ModelRunner, *, answers: bool, signs: bool) -> None:
        self._runner = runner
        self._answers = answers
        self._signs = signs
        self.runs_ahead = runner.runs_ahead
        """Whether a step may be begun before the one ahead of it is answered; else `execute`."""
        self.settles = isinstance(runner.model, GraphedModel)
        """Whether `settle` ever has something to do."""
        self._tail_s = 0.0
        self._in_flight: deque[LaunchedStep] = deque()
        self.facts: dict[str, object] = {}

    @property
    def may_run_ahead(self) -> bool:
        """Whether the step in flight may stay so while the next order is waited for.

        Not when there is something to settle: all ranks do that after the same step, whatever each
        of them has heard of the next one, because it may call on its peers.
        """
        return self._runner.runs_ahead and not self._runner.wants_to_settle

    @property
    def num_in_flight(self) -> int:
        """Steps begun and not answered."""
        return len(self._in_flight)

    @property
    def answer_is_ready(self) -> bool:
        """Whether `answer` would not wait; there is a step in flight."""
        return self._in_flight[0].is_done

    def execute(
        self, payload: Payload, say_nearly_done: Callable[[], None], waited_s: float
    ) -> bytes | None:
        """Run an encoded plan to its end; the encoded answer on the rank that gives it."""
        says = self._signs and self._tail_s >= _SIGN_WORTH_S
        plan = wire.decode_plan(payload)
        return self._encoded(
            self._runner.execute(plan, say_nearly_done if says else None, waited_s)
        )

    def begin(self, payload: Payload, say_nearly_done: Callable[[], None], waited_s: float) -> None:
        """Launch an encoded plan; see `ModelRunner.launch`."""
        says = self._signs and self._tail_s >= _SIGN_WORTH_S
        plan = wire.decode_plan(payload)
        step = self._runner.launch(plan, say_nearly_done if says else None, waited_s)
        self._in_flight.append(step)

    def answer(self) -> bytes | None:
        """See the oldest step to its end; the encoded answer on the rank that gives it."""
        return self._encoded(self._runner.finish(self._in_flight.popleft()))

    def settle(self) -> None:
        """See `ModelRunner.settle`."""
        self._runner.settle()

    def _encoded(self, output: StepOutput) -> bytes | None:
        if not self._answers:
            return None
        self._tail_s += _TAIL_GAIN * (output.timings_s.get("sample", 0.0) - self._tail_s)
        return wire.encode(output)
