"""Queues of a device that is none: work is done as late as events allow, on a virtual clock.

What was enqueued waits until somebody waits for it, and then runs in an order drawn at random from
those that the events permit. A missing event so shows as wrong bytes, sooner or later. Times are
those of a device: an operation begins when its queue is free, its events have passed and it was
given; a thread's own time moves on when it waits.
"""

from __future__ import annotations

import random
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from offload.readers.engine import ReadEngine
from replicas.worker.device_streams import Event, WorkQueue


@dataclass(eq=False)
class FakeEvent:
    device: FakeDevice
    passed_s: float | None = None

    def synchronize(self) -> None:
        self.device.run_until(self)


@dataclass(eq=False)
class FakeQueue:
    """Implements `WorkQueue`; `is_host`: whoever gives work does it himself, at once."""

    device: FakeDevice
    name: str
    is_host: bool = False
    free_s: float = 0.0
    todo: deque[FakeEvent | tuple[Callable[[], object], float, float]] = field(
        default_factory=deque
    )

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        assert target.numel() == source.numel()
        ready_s = self.device.arrived_s.get(source.data_ptr(), 0.0)
        seconds = source.numel() / self.device.link_bytes_per_s
        self.work(lambda: target.copy_(source), seconds, after_s=ready_s)

    def fill(self, target: torch.Tensor, value: int) -> None:
        self.work(lambda: target.fill_(value))

    def new(self, like: torch.Tensor, user: WorkQueue) -> torch.Tensor:
        return torch.full_like(like, -77)

    def wait(self, event: Event) -> None:
        assert isinstance(event, FakeEvent)
        with self.device.lock:
            if self.is_host:
                self.device.run_until(event)
            else:
                self.todo.append(event)

    def record(self) -> FakeEvent:
        event = FakeEvent(self.device)
        self.work(lambda: self._pass(event))
        return event

    def work(self, do: Callable[[], object], seconds: float = 0.0, after_s: float = 0.0) -> None:
        with self.device.lock:
            self.todo.append((do, seconds, max(after_s, self.device.thread_s)))
            if self.is_host:
                while self.todo:
                    self.step()

    def step(self) -> bool:
        """Do what is first, when it may be done."""
        if not self.todo:
            return False
        first = self.todo[0]
        if isinstance(first, FakeEvent):
            if first.passed_s is None:
                return False
            self.free_s = max(self.free_s, first.passed_s)
        else:
            do, seconds, given_s = first
            self.free_s = max(self.free_s, given_s) + seconds
            do()
        self.todo.popleft()
        return True

    def _pass(self, event: FakeEvent) -> None:
        event.passed_s = self.free_s


class FakeDevice:
    """Implements `DeviceStreams`.

    Args:
        computes_at_once: what computes is the host itself, as with CPU tensors; else it is given
            work as a device is (`computing().work`).
    """

    def __init__(
        self, *, seed: int = 0, link_bytes_per_s: float = 1e9, computes_at_once: bool = False
    ) -> None:
        self.lock = threading.RLock()
        self.link_bytes_per_s = link_bytes_per_s
        self.arrived_s: dict[int, float] = {}
        """When what lies at an address of the host was there."""
        self._chance = random.Random(seed)
        self._clock = threading.local()
        self._computing = FakeQueue(self, "computing", is_host=computes_at_once)
        self.queues = [self._computing]

    def new_queue(self) -> FakeQueue:
        self.queues.append(FakeQueue(self, f"queue {len(self.queues)}"))
        return self.queues[-1]

    def computing(self) -> FakeQueue:
        return self._computing

    @property
    def thread_s(self) -> float:
        """The calling thread's time."""
        return getattr(self._clock, "now_s", 0.0)

    def advance(self, to_s: float) -> None:
        self._clock.now_s = max(self.thread_s, to_s)

    def run_until(self, event: FakeEvent) -> None:
        with self.lock:
            chance = 1.0
            while event.passed_s is None:
                if self._chance.random() < chance:
                    self._chance.shuffle(self.queues)
                chance = 0.03  # the same queue goes on as far as it may
                assert any(queue.step() for queue in self.queues), "a deadlock"
            self.advance(event.passed_s)

    def finish(self) -> float:
        """Do all that was given; when the last of it was done."""
        for queue in list(self.queues):
            queue.record().synchronize()
        return max(queue.free_s for queue in self.queues)


@dataclass
class TimedEngine:
    """A disk on the device's clock. Bytes are there as soon as they are asked for, which is when
    they do most harm to whoever still needs the slot."""

    inner: ReadEngine
    device: FakeDevice
    bytes_per_s: float
    name: str = "timed"
    busy_s: float = 0.0
    free_s: float = 0.0

    def allocate(self, num_bytes: int) -> torch.Tensor:
        return self.inner.allocate(num_bytes)

    def submit(self, slot: int, buffer: torch.Tensor, offset: int) -> None:
        with self.device.lock:
            self.inner.submit(slot, buffer, offset)
            self.inner.wait(slot, 10.0)
            seconds = buffer.numel() / self.bytes_per_s
            self.free_s = max(self.free_s, self.device.thread_s) + seconds
            self.busy_s += seconds
            self.device.arrived_s[buffer.data_ptr()] = self.free_s

    def wait(self, slot: int, timeout_s: float) -> None:
        pass

    def close(self) -> None:
        self.inner.close()
