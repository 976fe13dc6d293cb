"""The engine's own thread: commands in from any thread, deltas out once per step.

Two steps deep: when a step is nearly done the next one is planned on top of it, so that the workers
never wait for the loop, and a command that arrives during most of a step still counts for the next.

All scheduler state is touched by the loop alone; other threads only append to the inbox and read
frozen snapshots. It does not spin: idle, it sleeps until a command arrives. Every request that
`add_request` accepted gets its last delta, whatever happens: when the executor is lost, or the
engine itself fails, all of them end with the root cause at once and the loop is over.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cluster.base.errors import (
    CollectiveTimeoutError,
    PenstockError,
    UnavailableError,
    WorkerDiedError,
)
from replicas.api import GenerationDelta, GenerationRequest, ReplicaStats
from replicas.engine.doorbell import Doorbell
from replicas.engine.executor import StepExecutor
from replicas.engine.faults import as_penstock_error
from replicas.engine.inbox import Abort, Add, Inbox
from replicas.engine.output_processor import error_delta
from replicas.engine.step_ledger import StepTimes
from replicas.engine.step_runner import Clock, StepRunner
from replicas.engine.step_source import OutputT, PlanT, RequestBook, StepSource

log = logging.getLogger(__name__)

OnDeltas = Callable[[list[GenerationDelta], ReplicaStats], None]
OnFatal = Callable[[PenstockError], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovery:
    """Workers to go on with."""

    executor: StepExecutor[Any, Any]
    keeps_cache: bool = False
    """They are those that are left, and hold what answered steps have computed."""


Recover = Callable[[PenstockError], Recovery | None]
"""From the loss of workers to those to go on with, however long it takes; None: there are none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopHealth:
    """What a health check judges an engine by; times are on the loop's clock."""

    step_started_s: float | None = None
    """Start of the step that the workers execute; None when they have nothing to do."""
    last_step_end_s: float | None = None
    oldest_waiting_since_s: float | None = None
    """Arrival of the choice that has waited longest for its first step."""
    num_unfinished: int = 0
    fatal: PenstockError | None = None


class EngineLoop:
    """Drives one step source over one executor; `start()` gives it a thread.

    Without `start()` its owner calls `run_once()`, always from the same thread. The executor stays
    its owner's: the loop never closes it, and leaves no step in it unless it failed.

    Args:
        on_deltas: called from the loop once per step, also when a step said nothing; what a step
            said is told while the next one is computed.
        on_fatal: called from the loop at most once, after the last deltas.
        step_timeout_s: longest time from the start of a step to its answer.
        recover: called from the loop when workers are lost; requests wait for it and then go on.
        clock: monotonic seconds.
    """

    def __init__(  # noqa: PLR0913 - where an engine is put together
        self,
        scheduler: StepSource[PlanT, OutputT],
        executor: StepExecutor[PlanT, OutputT],
        *,
        on_deltas: OnDeltas,
        on_fatal: OnFatal,
        step_timeout_s: float,
        recover: Recover = lambda error: None,
        clock: Clock = time.monotonic,
    ) -> None:
        self._scheduler: RequestBook = scheduler
        self._runner: StepRunner[Any, Any] = StepRunner(
            scheduler, executor, step_timeout_s=step_timeout_s, clock=clock
        )
        self._on_deltas = on_deltas
        self._on_fatal = on_fatal
        self._recover = recover
        self._lost: PenstockError | None = None
        self._clock = clock
        self._inbox = Inbox(clock)
        self._widen: Callable[[], StepExecutor[Any, Any]] | None = None
        self._stopping = False
        self._wake = Doorbell()
        self._drained = threading.Event()
        self._ended = threading.Event()
        self._health = LoopHealth()
        self._thread: threading.Thread | None = None
        self._unsaid: list[GenerationDelta] = []
        self._steps_unsaid = 0

    @property
    def health(self) -> LoopHealth:
        """The newest snapshot; safe from any thread."""
        return self._health

    @property
    def stats(self) -> ReplicaStats:
        """The load now; for the thread that runs the loop, or before it starts."""
        return self._scheduler.stats()

    @property
    def times(self) -> StepTimes:
        """Where the time of all steps went; safe from any thread."""
        return self._runner.ledger.times

    def start(self) -> None:
        """Run in a thread of its own until `stop()` or a fatal error."""
        self._thread = threading.Thread(target=self._run, name="engine-loop", daemon=True)
        self._thread.start()

    def add_request(self, request: GenerationRequest) -> None:
        """Queue a request; thread-safe, does not block. A later refusal comes as error deltas.

        Raises:
            PenstockError: the loop drains, has stopped, or has failed (then: why).
        """
        self._inbox.add(request)
        self._wake.ring()

    def abort(self, request_id: str, index: int | None = None) -> None:
        """End one choice or all of them before the next plan; an unknown id is ignored.

        What steps in flight compute for it, at most one token, is discarded.
        """
        self._inbox.abort(request_id, index)
        self._wake.ring()

    def lose_workers(self, error: PenstockError) -> None:
        """Somebody has seen that a worker is gone; the loop may be asleep. Thread-safe."""
        self._lost = error
        self._wake.ring()

    def widen(self, change: Callable[[], StepExecutor[Any, Any]]) -> None:
        """Call `change` from the loop while no step is in flight, and go on with what it returns.

        For workers that join: nothing of those that are there is lost. What it raises counts as
        raised by a step. Thread-safe; of two calls before the next step the later one counts.
        """
        self._widen = change
        self._wake.ring()

    def drain(self) -> None:
        """Take no new requests, finish those there are; see `wait_drained`."""
        self._refuse_with(UnavailableError("The replica is draining.", "Retry on another one."))

    def wait_drained(self, timeout_s: float) -> bool:
        """Wait until a drain is over; False on timeout."""
        return self._drained.wait(timeout_s)

    def stop(self, timeout_s: float = 10.0) -> bool:
        """End every request with an error, then the loop; False if it did not end in time."""
        self._refuse_with(UnavailableError("The replica is shutting down.", "Retry later."))
        self._stopping = True
        self._wake.ring()
        if self._thread is None:
            self.run_once()
        elif self._thread is not threading.current_thread():
            self._thread.join(timeout_s)
        return self._ended.is_set()

    def run_once(self) -> bool:
        """See one step to its end, and mostly the next one on its way.

        Commands are obeyed before each plan.

        Returns:
            False when there was nothing to do.
        """
        if self._ended.is_set():
            return False
        self._wake.clear()
        try:
            if self._lost is not None:
                raise self._lost
            if self._stopping and self._inbox.refusal is not None:
                return self._wind_up(self._inbox.refusal)
            if self._widen is not None:
                return self._take_in_workers(self._widen)
            if not self._runner.num_in_flight and not self._submit_next():
                return self._idle()
            # What the last step said is told while the workers compute: the callback's work, and
            # the threads it wakes, then cost the step nothing; unless the next plan cannot wait.
            plan_is_due = self._runner.plan_is_due
            if not plan_is_due:
                self._deliver()
            if not self._runner.wait_nearly_done():
                self._submit_next()
            if plan_is_due:
                self._deliver()
            self._collect()
        except (WorkerDiedError, CollectiveTimeoutError) as error:
            return self._replace_workers(error)
        except Exception as error:
            self._die(error)
            return False
        return True

    def _replace_workers(self, error: PenstockError) -> bool:
        """Go on with other workers; False when there are none, and the engine has ended."""
        self._deliver()
        self._note_health()
        try:
            recovery = None if self._stopping else self._recover(error)
        except PenstockError as failure:
            log.exception("the workers could not be replaced")
            recovery, error = None, failure
        except Exception:
            log.exception("the workers could not be replaced")
            recovery = None
        if recovery is None:
            self._die(error)
            return False
        self._lost = self._widen = None
        self._runner.restart(recovery.executor, keeps_cache=recovery.keeps_cache)
        return True

    def _take_in_workers(self, change: Callable[[], StepExecutor[Any, Any]]) -> bool:
        """Between two steps: see `widen`."""
        while self._runner.num_in_flight:
            self._collect()
        self._deliver()
        self._widen = None
        self._runner.use(change())
        return True

    def _run(self) -> None:
        while not self._ended.is_set():
            if not self.run_once() and not self._ended.is_set():
                self._wake.wait()

    def _submit_next(self) -> bool:
        """Plan with all that is known now; False when there is nothing to compute."""
        self._unsaid += self._obey()
        self._note_health(step_started_s=self._runner.oldest_started_s or self._clock())
        if self._runner.submit():
            return True
        self._note_health(step_started_s=self._runner.oldest_started_s)
        return False

    def _collect(self) -> None:
        self._unsaid += self._runner.collect()
        self._steps_unsaid += 1
        self._note_health(step_started_s=self._runner.oldest_started_s, step_ended=True)

    def _wind_up(self, error: PenstockError) -> bool:
        """Take in what is in flight, then end everything."""
        while self._runner.num_in_flight:
            self._collect()
        self._unsaid += self._obey()
        self._end(error)
        return False

    def _obey(self) -> list[GenerationDelta]:
        """Commands in order of arrival; what comes in meanwhile waits for the next plan."""
        deltas: list[GenerationDelta] = []
        for command in self._inbox.take():
            if isinstance(command, Abort):
                deltas.extend(self._scheduler.abort(command.request_id, command.index))
                continue
            try:
                self._scheduler.add(command.request, command.arrival_s)
            except Exception as error:
                refusal = as_penstock_error(error)
                log.info("request %s refused: %s", command.request.request_id, refusal)
                deltas += _refused(command.request, refusal)
        return deltas

    def _idle(self) -> bool:
        """Nothing is left to compute: say what is unsaid; False when there was nothing."""
        if self._unsaid or self._steps_unsaid:
            self._deliver()
            return True
        if self._inbox.refusal is not None and not self._inbox:
            self._drained.set()
        return False

    def _deliver(self) -> None:
        deltas, self._unsaid = self._unsaid, []
        if deltas or self._steps_unsaid:
            self._steps_unsaid = 0
            self._on_deltas(deltas, self._scheduler.stats())

    def _die(self, error: Exception) -> None:
        """The engine cannot go on: everyone hears why, then the owner does."""
        fatal = as_penstock_error(error)
        log.error("engine loop failed: %s", fatal, exc_info=error)
        self._end(fatal)
        self._note_health(fatal=fatal)
        self._on_fatal(fatal)

    def _end(self, error: PenstockError) -> None:
        """Fail what runs, waits or is still in the inbox; nothing is accepted afterwards."""
        self._inbox.close(error)
        for command in self._inbox.take():
            if isinstance(command, Add):
                self._unsaid += _refused(command.request, error, replica_lost=True)
        try:
            self._unsaid.extend(self._scheduler.fail_all(error))
            self._steps_unsaid += 1
            self._deliver()
        except Exception:
            log.exception("could not tell all callers of: %s", error)
        self._note_health()
        self._ended.set()
        self._drained.set()

    def _refuse_with(self, error: PenstockError) -> None:
        self._inbox.refuse(error)
        self._wake.ring()

    def _note_health(
        self,
        *,
        step_started_s: float | None = None,
        step_ended: bool = False,
        fatal: PenstockError | None = None,
    ) -> None:
        self._health = LoopHealth(
            step_started_s=step_started_s if self._scheduler.num_unfinished else None,
            last_step_end_s=self._clock() if step_ended else self._health.last_step_end_s,
            oldest_waiting_since_s=self._scheduler.oldest_waiting_arrival_s,
            num_unfinished=self._scheduler.num_unfinished,
            fatal=fatal,
        )


def _refused(
    request: GenerationRequest, error: PenstockError, *, replica_lost: bool = False
) -> list[GenerationDelta]:
    return [
        error_delta(request.request_id, choice.index, error, replica_lost=replica_lost)
        for choice in request.choices
    ]
