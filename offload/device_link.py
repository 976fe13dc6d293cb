"""Disk -> pinned host slot -> device slot, each stage beside the others and beside the computation.

A thread submits reads, and hands every record that has arrived to a copier, one contiguous copy per
record. A host slot is read into again only when its copy has ended, a device slot is copied into
again only when the computation has left it; with CUDA both are events between streams, so the
computing thread never waits for the device. Units that live in host memory skip the first stage.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass, field
from typing import Protocol

import torch

from cluster.base.errors import InternalError, WeightStreamError
from offload.host_link import HostLink, view
from offload.layout import Store
from offload.link import LinkStats

_CLOSE_TIMEOUT_S = 10.0


class Copier(Protocol):
    """Copies to device slots; `copy` and `wait_copied` on one thread, the others on another."""

    def copy(self, slot: int, target: torch.Tensor, source: torch.Tensor) -> None:
        """Start a copy into the slot, after what was computed from it has ended."""
        ...

    def wait_copied(self, slot: int) -> None:
        """Return when the slot's last copy has ended: its source may be overwritten."""
        ...

    def before_use(self, slot: int) -> None:
        """What is computed from now on comes after the slot's copy."""
        ...

    def after_use(self, slot: int) -> None:
        """What was computed until now is all that needs the slot."""
        ...


class HostCopier:
    """Implements `Copier` by plain copies: for slots in host memory, and to test the rest with."""

    def copy(self, slot: int, target: torch.Tensor, source: torch.Tensor) -> None:
        """Copies before it returns."""
        target.copy_(source)

    def wait_copied(self, slot: int) -> None:
        """Nothing is under way."""

    def before_use(self, slot: int) -> None:
        """Nothing is under way."""

    def after_use(self, slot: int) -> None:
        """Nothing is under way."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    unit: str
    slot: int
    done: Future[None] = field(default_factory=Future)


class DeviceLink:
    """Implements `Link`.

    Args:
        host: brings records to host slots, as many as there are device slots.
        slots: the device slots.
        pinned: records of units that live in host memory, whole.
    """

    def __init__(
        self,
        store: Store,
        host: HostLink,
        slots: Sequence[torch.Tensor],
        copier: Copier,
        *,
        pinned: Mapping[str, torch.Tensor],
        timeout_s: float,
    ) -> None:
        self._store = store
        self._host = host
        self._slots = list(slots)
        self._copier = copier
        self._pinned = pinned
        self._timeout_s = timeout_s
        self._jobs: dict[int, _Job] = {}
        self._queue: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._wait_s = 0.0
        self._pinned_bytes = 0
        self._thread = threading.Thread(target=self._run, name="weight-stages", daemon=True)
        self._thread.start()

    @property
    def stats(self) -> LinkStats:
        """Bytes that reached the device, from either tier; time lost to both stages."""
        host = self._host.stats
        return LinkStats(
            num_reads=host.num_reads,
            num_bytes=host.num_bytes + self._pinned_bytes,
            wait_s=self._wait_s,
            num_retries=host.num_retries,
        )

    def submit(self, unit: str, slot: int) -> None:
        """See `Link.submit`."""
        self._join(slot)
        if not self._thread.is_alive():
            raise WeightStreamError("The thread that stages weights is gone.")
        self._jobs[slot] = _Job(unit=unit, slot=slot)
        self._queue.put(self._jobs[slot])

    def wait(self, unit: str, slot: int) -> None:
        """See `Link.wait`."""
        started_s = time.perf_counter()
        job = self._jobs.get(slot)
        if job is None or job.unit != unit:
            raise InternalError(f"Slot {slot} was not asked to hold {unit}.")
        try:
            job.done.result(self._timeout_s)
        except FutureTimeoutError:
            raise WeightStreamError(
                f"{unit} has not reached the device after {self._timeout_s:g} s.",
                "Look at the disk, or raise the read timeout.",
            ) from None
        finally:
            self._wait_s += time.perf_counter() - started_s
        self._copier.before_use(slot)

    def tensors(self, unit: str, slot: int) -> Mapping[str, torch.Tensor]:
        """See `Link.tensors`."""
        entries = self._store.by_name[unit].tensors
        return {entry.name: view(self._slots[slot], entry) for entry in entries}

    def evict(self, slot: int) -> None:
        """See `Link.evict`."""
        self._join(slot)
        self._jobs.pop(slot, None)
        self._copier.after_use(slot)

    def close(self) -> None:
        """See `Link.close`."""
        self._queue.put(None)
        self._thread.join(_CLOSE_TIMEOUT_S)
        self._host.close()

    def _join(self, slot: int) -> None:
        """Let a fill end that nobody wants; how does not matter."""
        job = self._jobs.get(slot)
        if job is not None and not job.done.done():
            try:
                job.done.exception(self._timeout_s)
            except FutureTimeoutError:
                raise WeightStreamError(f"{job.unit} is still on its way.") from None

    def _run(self) -> None:
        reading: deque[_Job] = deque()
        while True:
            try:
                job = self._queue.get(block=not reading)
            except queue.Empty:
                self._stage(reading.popleft())
                continue
            if job is None:
                return
            if self._begin(job):
                reading.append(job)

    def _begin(self, job: _Job) -> bool:
        """Start the read of a job; whether there is one to wait for."""
        try:
            self._copier.wait_copied(job.slot)
            if job.unit in self._pinned:
                self._stage(job)
                return False
            self._host.submit(job.unit, job.slot)
        except Exception as error:
            job.done.set_exception(error)
            return False
        return True

    def _stage(self, job: _Job) -> None:
        try:
            source = self._pinned.get(job.unit)
            if source is None:
                self._host.wait(job.unit, job.slot)
                source = self._host.record(job.unit, job.slot)
            else:
                self._pinned_bytes += source.numel()
            self._copier.copy(job.slot, self._slots[job.slot][: source.numel()], source)
        except Exception as error:
            job.done.set_exception(error)
            return
        job.done.set_result(None)
