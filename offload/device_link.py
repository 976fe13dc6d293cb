"""Disk -> pinned staging slot -> device slot, all stages side by side with the computation.

    disk       read a | read b | read c |        read d |      staging: 2 slots
    link              | copy a | copy b | copy c |      | copy d
    computing                  | use a  | use b  | use c |     | use d

A thread (`offload/staging.py`) submits reads, and hands every record that has arrived to a copier,
one contiguous copy per record. A staging slot is read into again only when the copy out of it has
ended, a device slot is copied into again only when the computation has left it; both are events
between queues of work, so the computing thread never waits for the device. Units that live in host
memory skip the first stage: their copies are enqueued at once.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import TimeoutError as FutureTimeoutError

import torch

from cluster.base.errors import InternalError, WeightStreamError
from offload.device_copier import DeviceCopier, Ended
from offload.host_link import view
from offload.layout import Store
from offload.link import LinkStats
from offload.staging import Job, Staging


class DeviceLink:
    """Implements `Link`.

    Args:
        staging: of units from disk; None: all units that are asked for are `pinned`.
        slots: the device slots.
        pinned: records of units that live in host memory, whole.
    """

    def __init__(
        self,
        store: Store,
        staging: Staging | None,
        slots: Sequence[torch.Tensor],
        copier: DeviceCopier,
        *,
        pinned: Mapping[str, torch.Tensor],
        timeout_s: float,
    ) -> None:
        self._store = store
        self._slots = list(slots)
        self._copier = copier
        self._pinned = pinned
        self._timeout_s = timeout_s
        self._jobs: dict[int, Job] = {}
        self._copies: dict[int, Ended] = {}
        self._wait_s = 0.0
        self._pinned_bytes = 0
        self._staging = staging
        if staging is not None:
            staging.start(self._copy)

    @property
    def stats(self) -> LinkStats:
        """Bytes that reached the device, from either tier; time lost to both stages."""
        host = LinkStats() if self._staging is None else self._staging.stats
        return LinkStats(
            num_reads=host.num_reads,
            num_bytes=host.num_bytes + self._pinned_bytes,
            wait_s=self._wait_s,
            num_retries=host.num_retries,
        )

    def submit(self, unit: str, slot: int) -> None:
        """See `Link.submit`."""
        self._join(slot)
        job = self._jobs[slot] = Job(unit=unit, slot=slot)
        if (source := self._pinned.get(unit)) is not None:
            self._pinned_bytes += source.numel()
            self._copy(job, source)
        elif self._staging is None:
            raise InternalError(f"{unit} is on disk, and no slot of the host was made for it.")
        else:
            self._staging.put(job)

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
        self._copier.after_use(slot, self._slots[slot])

    def close(self) -> None:
        """See `Link.close`; afterwards no copy reads host memory any more."""
        if self._staging is not None:
            self._staging.close()
        for ended in self._copies.values():
            ended()
        self._copies.clear()

    def _copy(self, job: Job, source: torch.Tensor) -> Ended | None:
        """Enqueue the last stage of a job; None: it failed, and the job says how."""
        try:
            target = self._slots[job.slot][: source.numel()]
            ended = self._copies[job.slot] = self._copier.copy(job.slot, target, source)
        except Exception as error:
            job.done.set_exception(error)
            return None
        job.done.set_result(None)
        return ended

    def _join(self, slot: int) -> None:
        """Let a fill end that nobody wants; how does not matter."""
        job = self._jobs.get(slot)
        if job is not None and not job.done.done():
            try:
                job.done.exception(self._timeout_s)
            except FutureTimeoutError:
                raise WeightStreamError(f"{job.unit} is still on its way.") from None
