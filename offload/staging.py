"""The first of two stages: records from disk into pinned host slots, and on to who copies them.

A thread does it. Reads are under way in as many slots as there are; they are handed on in the order
in which they were asked for, and a slot is read into again when the copy out of it has ended.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch

from cluster.base.errors import WeightStreamError
from offload.device_copier import Ended
from offload.host_link import HostLink
from offload.link import LinkStats

_CLOSE_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A unit on its way to a slot of the device."""

    unit: str
    slot: int
    done: Future[None] = field(default_factory=Future)
    """Its copy is enqueued, or why it cannot be."""


CopyOn = Callable[[Job, torch.Tensor], Ended | None]
"""Enqueues the copy of a job from the record in host memory; None: it failed, the job says why."""


class Staging:
    """Host slots, and the thread that fills them.

    Args:
        link: brings records to host slots.
        num_slots: how many of them; fewer than the device has will do, as copies are short.
    """

    def __init__(self, link: HostLink, num_slots: int) -> None:
        self._link = link
        self._ended: list[Ended | None] = [None] * num_slots
        self._next = 0
        self._queue: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    @property
    def stats(self) -> LinkStats:
        """What was read."""
        return self._link.stats

    def start(self, copy_on: CopyOn) -> None:
        """Begin to work."""
        self._thread = threading.Thread(
            target=self._run, args=(copy_on,), name="weight-stages", daemon=True
        )
        self._thread.start()

    def put(self, job: Job) -> None:
        """Bring the job's unit from disk, after those before it.

        Raises:
            WeightStreamError: the thread is gone.
        """
        if self._thread is None or not self._thread.is_alive():
            raise WeightStreamError("The thread that stages weights is gone.")
        self._queue.put(job)

    def close(self) -> None:
        """Stop, and end what is being read; safe to call twice."""
        self._queue.put(None)
        if self._thread is not None:
            self._thread.join(_CLOSE_TIMEOUT_S)
        self._link.close()

    def _run(self, copy_on: CopyOn) -> None:
        reading: deque[tuple[Job, int]] = deque()
        while True:
            if len(reading) == len(self._ended):
                self._hand_on(*reading.popleft(), copy_on)
            try:
                job = self._queue.get(block=not reading)
            except queue.Empty:
                self._hand_on(*reading.popleft(), copy_on)
                continue
            if job is None:
                return
            if (staged := self._read(job)) is not None:
                reading.append((job, staged))

    def _read(self, job: Job) -> int | None:
        """Start to read a job's unit; the host slot, or None when that failed."""
        staged = self._next
        self._next = (staged + 1) % len(self._ended)
        try:
            if (ended := self._ended[staged]) is not None:
                ended()
                self._ended[staged] = None
                self._link.evict(staged)
            self._link.submit(job.unit, staged)
        except Exception as error:
            job.done.set_exception(error)
            return None
        return staged

    def _hand_on(self, job: Job, staged: int, copy_on: CopyOn) -> None:
        try:
            self._link.wait(job.unit, staged)
        except Exception as error:
            job.done.set_exception(error)
            return
        self._ended[staged] = copy_on(job, self._link.record(job.unit, staged))
