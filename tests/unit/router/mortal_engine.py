"""Replicas that are lost after a given number of steps, in the ways in which replicas are lost."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from fake_engine import Publish

from cluster.base.errors import PenstockError, WorkerDiedError
from replicas.api import GenerationDelta, GenerationRequest, ReplicaStats
from replicas.engine.engine_loop import EngineLoop
from replicas.engine.output_processor import error_delta
from tests.support.in_process_engine import in_process_engine

LOST = WorkerDiedError("rank 1 was killed.")


class Engine(Protocol):
    def start(self, publish: Publish) -> None: ...
    def stop(self) -> None: ...
    def add_request(self, request: GenerationRequest) -> None: ...
    def abort(self, request_id: str, index: int | None = None) -> None: ...


@dataclass
class Fate:
    """When the replica that works dies next; shared by the replicas of a gateway."""

    steps_left: int = -1
    """Steps that are told before; below 0: it lives."""
    says_so: bool = False
    """Whether it tells that it fails; else its stream is cut."""
    deaths_left: int = 0
    num_deaths: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def plan(self, steps: int, *, says_so: bool = False, deaths: int = 1) -> None:
        """The next `deaths` replicas die after `steps` steps each."""
        with self.lock:
            self._steps, self.steps_left = steps, steps
            self.says_so, self.deaths_left = says_so, deaths

    def is_due(self) -> bool:
        return self.deaths_left > 0 and self.steps_left == 0

    def die(self) -> None:
        self.num_deaths += 1
        self.deaths_left -= 1
        self.steps_left = self._steps if self.deaths_left else -1


class MortalEngine:
    """Another engine, whose replica dies by fate; a successor is there at once."""

    def __init__(self, inner: Engine, fate: Fate) -> None:
        self.inner = inner
        self._fate = fate
        self._loop = asyncio.get_running_loop()
        self._open: dict[str, set[int]] = {}
        self._is_dead = False

    def start(self, publish: Publish) -> None:
        """`publish` is that of the replica's stream server, whose connections end with it."""
        self._publish = publish
        self._server = publish.__self__
        self.inner.start(self._say)

    def stop(self) -> None:
        self.inner.stop()

    @property
    def num_running(self) -> int:
        return len(self._open)

    def add_request(self, request: GenerationRequest) -> None:
        with self._fate.lock:
            self._is_dead = False
            self._open[request.request_id] = {choice.index for choice in request.choices}
            if self._fate.is_due():
                self._die()
                return
        self.inner.add_request(request)

    def abort(self, request_id: str, index: int | None = None) -> None:
        self.inner.abort(request_id, index)

    def _say(self, deltas: Sequence[GenerationDelta], stats: ReplicaStats) -> None:
        with self._fate.lock:
            if self._is_dead:
                return
            for delta in deltas:
                if delta.finish_reason is not None:
                    self._open.get(delta.request_id, set()).discard(delta.index)
            self._open = {name: rest for name, rest in self._open.items() if rest}
            self._publish(deltas, stats)
            if deltas and self._fate.steps_left > 0:
                self._fate.steps_left -= 1
            if self._fate.is_due() and self._open:
                self._die()

    def end_all(self, error: PenstockError) -> None:
        """End every request as an engine that stops does."""
        with self._fate.lock:
            self._end_all(error)

    def _end_all(self, error: PenstockError) -> None:
        lost = [
            error_delta(name, index, error, replica_lost=True)
            for name, rest in self._open.items()
            for index in rest
        ]
        self._publish(lost, ReplicaStats())
        for name in self._open:
            self.inner.abort(name)
        self._open.clear()

    def _die(self) -> None:
        self._fate.die()
        self._is_dead = True
        if self._fate.says_so:
            self._end_all(LOST)
        for name in self._open:
            self.inner.abort(name)
        self._open.clear()
        self._loop.call_soon_threadsafe(self._cut, self._fate.says_so)

    def _cut(self, says_so: bool) -> None:
        for link in list(self._server._links.values()):
            if says_so:
                link.say_goodbye(LOST)
            else:
                link.end()


class ModelEngine:
    """The whole engine with a real model, in a thread of its own."""

    def __init__(self, path: Path, **limits: object) -> None:
        engine = in_process_engine(path, **limits)
        self._scheduler, self._executor = engine._scheduler, engine._runner._executor
        self.loop: EngineLoop | None = None

    def start(self, publish: Publish) -> None:
        self.loop = EngineLoop(
            self._scheduler,
            self._executor,
            on_deltas=publish,
            on_fatal=lambda error: None,
            step_timeout_s=60.0,
        )
        self.loop.start()

    def stop(self) -> None:
        assert self.loop is not None
        self.loop.stop()

    def add_request(self, request: GenerationRequest) -> None:
        assert self.loop is not None
        self.loop.add_request(request)

    def abort(self, request_id: str, index: int | None = None) -> None:
        assert self.loop is not None
        self.loop.abort(request_id, index)
