"""An engine loop over the simulated executor, with everything it said."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from simulated_executor import EOS, SimulatedExecutor, config

from cluster.base.errors import PenstockError
from replicas.api import GenerationDelta, ReplicaStats
from replicas.engine.engine_loop import EngineLoop, Recovery
from replicas.engine.scheduler import Scheduler


class Harness:
    """A loop over the simulated executor; collects what it says."""

    def __init__(self, **limits: Any) -> None:
        self.config = config(**limits)
        self.scheduler = Scheduler(self.config, EOS)
        self.executor = SimulatedExecutor(self.config)
        self.now = 100.0
        self.calls: list[tuple[list[GenerationDelta], ReplicaStats]] = []
        self.fatal: list[PenstockError] = []
        self.losses: list[PenstockError] = []
        self.spare_executors: list[SimulatedExecutor] = []
        self.heard = threading.Condition()
        self.on_deltas: Callable[[], None] = lambda: None
        self.loop = EngineLoop(
            self.scheduler,
            self.executor,
            on_deltas=self._hear,
            on_fatal=self.fatal.append,
            step_timeout_s=5.0,
            recover=self._recover,
            clock=lambda: self.now,
        )

    def _recover(self, error: PenstockError) -> Recovery | None:
        self.losses.append(error)
        if self.spare_executors:
            self.executor = self.spare_executors.pop()
            return Recovery(executor=self.executor)
        return None

    def _hear(self, deltas: list[GenerationDelta], stats: ReplicaStats) -> None:
        with self.heard:
            self.calls.append((list(deltas), stats))
            self.heard.notify_all()
        self.on_deltas()

    @property
    def deltas(self) -> list[GenerationDelta]:
        return [delta for deltas, _ in list(self.calls) for delta in deltas]

    def last(self) -> dict[tuple[str, int], GenerationDelta]:
        finals = [delta for delta in self.deltas if delta.finish_reason is not None]
        by_choice = {(delta.request_id, delta.index): delta for delta in finals}
        assert len(by_choice) == len(finals), "two last deltas for one choice"
        return by_choice

    def codes(self) -> dict[str, str | None]:
        return {k[0]: (d.error or {}).get("code") for k, d in self.last().items()}

    def wait_for(self, condition: Callable[[], bool]) -> None:
        with self.heard:
            assert self.heard.wait_for(condition, 10.0)
